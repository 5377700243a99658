#!/bin/sh
# ./dev device-kit: collects into FOLDER what a machine with PyTorch and a compiler, but without Debian's packages and
# without a network, lacks to build this project: device/kit.sh FOLDER
# Static libraries where Debian has them. The others need a C library no older than this machine's, so Debian 12 makes the
# kit that runs in most places.
set -eu
folder=$1
# The libraries behind those that have no static one; their packages' names hold a version.
shared() { apt-cache depends --no-recommends --no-suggests "$1" | sed -n "s/^ *Depends: \($2[^ ]*\)$/\1/p" | head -1; }
simdjson=$(shared libsimdjson-dev libsimdjson)
benchmark=$(shared libbenchmark-dev libbenchmark1)
# Of Gloo the headers alone: those of LibTorch's process group want them, and PyTorch holds the code.
packages="libgloo-dev libyaml-dev zlib1g-dev nlohmann-json3-dev libeigen3-dev libsimdjson-dev $simdjson libcli11-dev libjs-chart.js
  libgtest-dev libgmock-dev libbenchmark-dev $benchmark"

rm -rf "$folder"
mkdir -p "$folder/packages"
# shellcheck disable=SC2086 # a list of words
(cd "$folder/packages" && apt-get download -q $packages)
for package in "$folder"/packages/*.deb; do dpkg -x "$package" "$folder"; done
rm -rf "$folder/packages" "$folder/usr/share/doc" "$folder/usr/share/man" "$folder/usr/share/lintian" \
  "$folder/usr/include/eigen3/unsupported" "${folder:?}/usr/src" "${folder:?}/usr/bin"
find "$folder" -name 'libgloo*' -delete
# Chart.js lies behind links that lead out of the folder.
chart=$(find "$folder" -name chart.min.js | head -1)
[ -n "$chart" ] || chart=$(find "$folder" -name chart.umd.js | head -1)
if [ -n "$chart" ]; then cp -L "$chart" "$folder/chart.min.js"; fi
# Links that lead out of here: what they name is linked from the archive beside them.
find "$folder" -type l -lname '/*' -delete
find "$folder" -xtype l -delete
ls "$folder/chart.min.js" "$folder/usr/include/yaml.h" >/dev/null
du -sh "$folder"
