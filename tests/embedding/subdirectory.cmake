# Builds a project that has moectl as a subdirectory, here as a shared library: what it builds, its SONAME and what it
# exports.
include(${CMAKE_CURRENT_LIST_DIR}/run.cmake)
file(REMOVE_RECURSE ${WORK})
run(${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR}/subdirectory -B ${WORK} -G Ninja -DCMAKE_CXX_COMPILER=${CXX}
    -DCMAKE_CXX_COMPILER_LAUNCHER=${LAUNCHER} -DBUILD_SHARED_LIBS=ON -DCMAKE_BUILD_TYPE=Debug
    -DCMAKE_CXX_FLAGS_DEBUG=-O0 -DCMAKE_DISABLE_FIND_PACKAGE_CLI11=ON)
run(${CMAKE_COMMAND} --build ${WORK})
run(${WORK}/embeds_subdirectory)

string(REGEX MATCH "^[0-9]+\\.[0-9]+" minor ${VERSION})
file(GLOB library ${WORK}/moectl/libmoectl_core.so.${VERSION})
run(readelf -d ${library})
if(NOT output MATCHES "SONAME[^\n]*\\[libmoectl_core\\.so\\.${minor}\\]")
  message(FATAL_ERROR "The SONAME is not libmoectl_core.so.${minor}:\n${output}")
endif()
run(nm --dynamic --defined-only --format=posix ${library})
string(REGEX MATCHALL "[^\n]+" symbols "${output}")
set(strangers ${symbols})
list(FILTER strangers EXCLUDE REGEX "^_Z[^ ]*6moectl")
if(strangers)
  message(FATAL_ERROR "Exported although not in moectl:: ${strangers}")
endif()
if(NOT symbols MATCHES "_ZTIN6moectl11ConfigErrorE")
  message(FATAL_ERROR "The type information of ConfigError is not exported: no user could catch it")
endif()
