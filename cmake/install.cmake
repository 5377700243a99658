# What `cmake --install` installs, for find_package(moectl COMPONENTS core c torch prometheus) and for pkg-config, in the
# components core, c, torch, prometheus, tool and python; and the Debian package that `cpack` makes of each.
include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/moectl)
set(header_dir ${CMAKE_INSTALL_INCLUDEDIR}/moectl)
set(data_dir ${CMAKE_INSTALL_DATADIR}/moectl)

# The library `name` with its CMake target, its pkg-config file moectl-NAME.pc and its Debian package. The rest are
# what code that links the library needs as well: `requires` modules of pkg-config, `cflags` and `libs`.
function(install_library name)
  cmake_parse_arguments(PARSE_ARGV 1 pc "" "" "REQUIRES;CFLAGS;LIBS")
  set(pc_name moectl-${name})
  set(pc_library moectl_${name})
  if(name STREQUAL "c")  # is moectl itself to those who see no other
    set(pc_name moectl)
    set(pc_library moectl)
  endif()
  install(TARGETS moectl_${name} EXPORT moectl_${name} COMPONENT ${name})
  install(EXPORT moectl_${name} NAMESPACE moectl:: FILE moectl-${name}.cmake DESTINATION ${package_dir}
    COMPONENT ${name})
  list(JOIN pc_REQUIRES " " pc_requires)
  list(JOIN pc_CFLAGS " " pc_cflags)
  list(JOIN pc_LIBS " " pc_libs)
  # From the file's own folder, so that an installed tree may be moved.
  file(RELATIVE_PATH pc_prefix ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
  string(REGEX REPLACE "/$" "" pc_prefix ${pc_prefix})
  configure_file(${PROJECT_SOURCE_DIR}/cmake/moectl.pc.in ${PROJECT_BINARY_DIR}/${pc_name}.pc @ONLY)
  install(FILES ${PROJECT_BINARY_DIR}/${pc_name}.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT ${name})
endfunction()

# A static library leaves what it calls to whoever links it; a shared one brings it along.
set(core_requires yaml-0.1 zlib simdjson)
set(core_debian libyaml-dev zlib1g-dev libsimdjson-dev)
if(BUILD_SHARED_LIBS)
  set(core_requires "")
endif()
install_library(core REQUIRES ${core_requires})
install(DIRECTORY include/moectl ${PROJECT_BINARY_DIR}/include/moectl DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  COMPONENT core FILES_MATCHING PATTERN "*.h" PATTERN "torch" EXCLUDE PATTERN "prometheus.h" EXCLUDE)
configure_package_config_file(cmake/moectlConfig.cmake.in ${PROJECT_BINARY_DIR}/moectlConfig.cmake
  INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/moectlConfigVersion.cmake COMPATIBILITY SameMinorVersion)
# What all components need comes with c where there is one: it depends on no other, so that C needs no C++ library.
set(common core)
if(MOECTL_C)
  set(common c)
endif()
install(FILES ${PROJECT_BINARY_DIR}/moectlConfig.cmake ${PROJECT_BINARY_DIR}/moectlConfigVersion.cmake
  DESTINATION ${package_dir} COMPONENT ${common})
set(components core)

if(MOECTL_C)
  install_library(c)
  install(FILES include/moectl.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT c)
  if(MOECTL_HWCAPS)
    foreach(processor x86-64-v3 x86-64-v4)
      install(TARGETS moectl_c_${processor} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}/glibc-hwcaps/${processor}
        NAMELINK_SKIP COMPONENT c)
    endforeach()
  endif()
  set(MOECTL_PYTHON_DIR lib/python3/dist-packages CACHE STRING "Where the Python package is installed, below the prefix")
  install(DIRECTORY python/moectl DESTINATION ${MOECTL_PYTHON_DIR} COMPONENT python
    FILES_MATCHING PATTERN "*.py" PATTERN "py.typed" PATTERN "*.jsonl" PATTERN "__pycache__" EXCLUDE)
  list(APPEND components c python)
endif()

if(MOECTL_TORCH)
  # LibTorch has no pkg-config file of its own. Its libraries by name where the linker finds them anyway.
  get_filename_component(torch_folder ${TORCH_LIBRARY} DIRECTORY)
  set(torch_libs -ltorch -ltorch_cpu -lc10)
  if(NOT torch_folder IN_LIST CMAKE_CXX_IMPLICIT_LINK_DIRECTORIES)
    list(PREPEND torch_libs -L${torch_folder} -Wl,-rpath,${torch_folder})
  endif()
  list(TRANSFORM TORCH_INCLUDE_DIRS PREPEND -I OUTPUT_VARIABLE torch_cflags)
  # Its headers leave out process groups unless told what the library was built with.
  get_target_property(torch_definitions torch_cpu INTERFACE_COMPILE_DEFINITIONS)
  if(torch_definitions)
    list(TRANSFORM torch_definitions PREPEND -D)
    list(APPEND torch_cflags ${torch_definitions})
  endif()
  install_library(torch REQUIRES "moectl-core = ${PROJECT_VERSION}" CFLAGS ${torch_cflags} ${TORCH_CXX_FLAGS}
    LIBS ${torch_libs})
  install(DIRECTORY include/moectl/torch DESTINATION ${header_dir} COMPONENT torch)
  install(FILES cmake/torch.cmake DESTINATION ${package_dir} COMPONENT torch)
  list(APPEND components torch)
endif()

if(MOECTL_PROMETHEUS)
  set(prometheus_requires "moectl-core = ${PROJECT_VERSION}")
  if(NOT BUILD_SHARED_LIBS)
    list(APPEND prometheus_requires prometheus-cpp-pull)
    set(prometheus_libs -lcivetweb-cpp -lcivetweb)  # civetweb has no .pc file on bookworm
  endif()
  install_library(prometheus REQUIRES ${prometheus_requires} LIBS ${prometheus_libs})
  install(FILES include/moectl/prometheus.h DESTINATION ${header_dir} COMPONENT prometheus)
  list(APPEND components prometheus)
endif()

if(MOECTL_TOOL)
  install(TARGETS moectl RUNTIME COMPONENT tool)
  install(DIRECTORY policies/ DESTINATION ${data_dir}/policies COMPONENT tool FILES_MATCHING PATTERN "*.yaml")
  install(DIRECTORY monitoring DESTINATION ${data_dir} COMPONENT tool)
  list(APPEND components tool)
endif()

# ---- Debian packages: ./dev package ----
set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_CONTACT "The moectl developers")
set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
set(CPACK_STRIP_FILES ON)
set(CPACK_DEB_COMPONENT_INSTALL ON)
set(CPACK_COMPONENTS_ALL ${components})
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_ENABLE_COMPONENT_DEPENDS OFF)
# Libraries that a binary links become dependencies, found by dpkg-shlibdeps; what a developer needs is named here.
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS_PRIVATE_DIRS ${PROJECT_BINARY_DIR})
function(debian_package component name section depends summary)
  if(NOT component IN_LIST components)
    return()
  endif()
  install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/${name} RENAME copyright COMPONENT ${component})
  string(TOUPPER ${component} key)
  set(CPACK_DEBIAN_${key}_PACKAGE_NAME ${name} PARENT_SCOPE)
  set(CPACK_DEBIAN_${key}_PACKAGE_SECTION ${section} PARENT_SCOPE)
  set(CPACK_DEBIAN_${key}_PACKAGE_DEPENDS ${depends} PARENT_SCOPE)
  set(CPACK_COMPONENT_${key}_DESCRIPTION "${summary}" PARENT_SCOPE)
endfunction()
set(same_core "libmoectl-dev (= ${PROJECT_VERSION})")
if(MOECTL_C)
  list(APPEND core_debian "libmoectl0 (= ${PROJECT_VERSION})")
endif()
list(JOIN core_debian ", " core_debian)
debian_package(core libmoectl-dev libdevel "${core_debian}" "The library, for C++ programs.")
debian_package(c libmoectl0 libs "" "The library for C and for languages that call C, with its header.")
debian_package(python python3-moectl python "libmoectl0 (= ${PROJECT_VERSION}), moectl (= ${PROJECT_VERSION}), python3 (>= 3.9)"
  "The package for Python.")
set(CPACK_DEBIAN_PYTHON_PACKAGE_ARCHITECTURE all)
debian_package(torch libmoectl-torch-dev libdevel "${same_core}, libtorch-dev" "The adapter for LibTorch.")
debian_package(prometheus libmoectl-prometheus-dev libdevel "${same_core}, prometheus-cpp-dev"
  "The endpoint for Prometheus.")
debian_package(tool moectl science "" "The command-line tool, the configs of all policies, and alerts and a dashboard for Prometheus.")
if(MOECTL_NATIVE)
  set(CPACK_PROJECT_CONFIG_FILE ${PROJECT_SOURCE_DIR}/cmake/native_package.cmake)
endif()
include(CPack)
