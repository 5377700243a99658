#!/bin/sh
# ./dev build-cuda: compiles and links the adapter, the example, the bench and the tests on a device against LibTorch for CUDA,
# on a machine without a GPU: Debian 13's packages of it, unpacked into FOLDER. What the vendor's libraries would bring stays
# unresolved, so nothing of it is run: device/cuda_flavour.sh FOLDER
# Fetches 1.6 GB, of which a third are headers that lie in packages of Debian's section non-free.
set -eu
cd "$(dirname "$0")/../.." || exit 2
folder=$1
if ! [ -e "$folder/complete" ]; then
  rm -rf "$folder"
  mkdir -p "$folder/apt/lists/partial" "$folder/apt/cache/archives/partial" "$folder/packages"
  folder=$(cd "$folder" && pwd)
  # Lists of their own: the machine's are left alone.
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -1)
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main contrib non-free" \
    >"$folder/apt/sources.list"
  apt() {
    apt-get -q -o Dir::Etc::SourceList="$folder/apt/sources.list" -o Dir::Etc::SourceParts=/nonexistent \
      -o Dir::State::Lists="$folder/apt/lists" -o Dir::Cache="$folder/apt/cache" "$@"
  }
  apt update
  (cd "$folder/packages" && apt download libtorch-cuda-dev libtorch-cuda-2.6 libgloo-dev libcudart12 libcu++-dev nvidia-cuda-dev \
    libnccl-dev)
  for package in libtorch-cuda-dev libtorch-cuda-2.6 libgloo-dev libcudart12 libcu++-dev; do
    dpkg -x "$folder"/packages/${package}_*.deb "$folder"
  done
  for package in nvidia-cuda-dev libnccl-dev; do  # their headers alone, or it would be 5 GB
    dpkg-deb --fsys-tarfile "$folder"/packages/${package}_*.deb | tar -x -C "$folder" --wildcards './usr/include/*'
  done
  rm -rf "$folder/packages"
  mkdir "$folder/torch"
  ln -s ../usr/include "$folder/torch/include"
  ln -s "../usr/lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || echo x86_64-linux-gnu)" "$folder/torch/lib"
  touch "$folder/complete"
fi
folder=$(cd "$folder" && pwd)
cmake -G Ninja -S . -B build/cuda -DCMAKE_BUILD_TYPE=Release -DMOECTL_TORCH_FOLDER="$folder/torch" \
  -DMOECTL_CUDA_INCLUDE="$folder/usr/include" -DMOECTL_NCCL_INCLUDE="$folder/usr/include" \
  -DMOECTL_INSTALL=OFF -DMOECTL_WERROR=OFF -DCMAKE_GTEST_DISCOVER_TESTS_DISCOVERY_MODE=PRE_TEST ${CMAKE_ARGUMENTS:-}
cmake --build build/cuda --target device_tests cuda_tests nccl_tests train_moe_lm device_bench
for program in tests/cuda_tests tests/nccl_tests tests/device_tests examples/train_moe_lm bench/device_bench; do
  readelf -d "build/cuda/$program" | grep -q 'NEEDED.*libtorch_cuda' || { echo "$program: not linked with libtorch_cuda" >&2; exit 1; }
done
echo "compiled and linked; not run"
