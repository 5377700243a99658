# moectl::libtorch: Debian's LibTorch as one imported target, the same for this build and for the installed package.
if(NOT TARGET moectl::libtorch)
  # The package's own files warn about a profiler library that Debian does not ship and that nothing needs.
  set(moectl_saved_log_level ${CMAKE_MESSAGE_LOG_LEVEL})
  set(CMAKE_MESSAGE_LOG_LEVEL ERROR)
  find_package(Torch REQUIRED)
  set(CMAKE_MESSAGE_LOG_LEVEL ${moectl_saved_log_level})
  list(FILTER TORCH_LIBRARIES EXCLUDE REGEX "NOTFOUND")
  add_library(moectl::libtorch INTERFACE IMPORTED)
  set_target_properties(moectl::libtorch PROPERTIES
    INTERFACE_LINK_LIBRARIES "${TORCH_LIBRARIES}"
    INTERFACE_INCLUDE_DIRECTORIES "${TORCH_INCLUDE_DIRS}")
endif()
