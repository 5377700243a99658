# Installs the build into a folder of its own and uses the library for C from there: by CMake, by pkg-config with nothing
# but a C compiler, and from Python. cmake -DBUILD=build/release -DWORK=scratch -DLIBDIR=lib -DCXX=c++ -P c.cmake
include(${CMAKE_CURRENT_LIST_DIR}/run.cmake)
file(REMOVE_RECURSE ${WORK})
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/prefix)
run(${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR}/c -B ${WORK}/build -G Ninja -DCMAKE_CXX_COMPILER=${CXX}
    -DCMAKE_PREFIX_PATH=${WORK}/prefix)
run(${CMAKE_COMMAND} --build ${WORK}/build)
run(${WORK}/build/embeds_c)

file(RENAME ${WORK}/prefix ${WORK}/moved)
set(ENV{PKG_CONFIG_PATH} ${WORK}/moved/${LIBDIR}/pkgconfig)
set(ENV{LD_LIBRARY_PATH} ${WORK}/moved/${LIBDIR})
run(pkg-config --modversion moectl)
if(NOT output STREQUAL "${VERSION}\n")
  message(FATAL_ERROR "pkg-config's version of moectl is ${output}, not ${VERSION}")
endif()
run(pkg-config --cflags --libs moectl)
separate_arguments(flags UNIX_COMMAND "${output}")
run(cc -std=c99 -Wall -Wextra -Wpedantic -Werror ${CMAKE_CURRENT_LIST_DIR}/../../examples/loop.c ${flags}
    -o ${WORK}/by_pkg_config)
run(${WORK}/by_pkg_config)

set(ENV{PYTHONPATH} ${WORK}/moved/lib/python3/dist-packages)
set(ENV{PYTHONDONTWRITEBYTECODE} 1)
run(/usr/bin/python3 -c "print(__import__('moectl').__version__)")
if(NOT output STREQUAL "${VERSION}\n")
  message(FATAL_ERROR "The installed Python package is ${output}, not ${VERSION}")
endif()
