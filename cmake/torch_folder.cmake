# moectl::libtorch from PyTorch's own folder (include/ and lib/), for machines where its CMake package fails: that of a
# build for CUDA wants the whole CUDA toolkit, of which nothing here needs more than headers.
set(MOECTL_TORCH_FOLDER "" CACHE PATH "Take LibTorch from this folder, without its CMake package")
if(MOECTL_TORCH_FOLDER)
  set(TORCH_LIBRARIES "")
  foreach(library torch torch_cpu c10 torch_cuda c10_cuda)
    find_library(MOECTL_TORCH_${library} ${library} PATHS ${MOECTL_TORCH_FOLDER}/lib NO_DEFAULT_PATH)
    if(MOECTL_TORCH_${library})
      list(APPEND TORCH_LIBRARIES ${MOECTL_TORCH_${library}})
    endif()
  endforeach()
  set(TORCH_LIBRARY ${MOECTL_TORCH_torch})
  add_library(moectl::libtorch INTERFACE IMPORTED)
  # By name no code needs the parts for CUDA: they register themselves when they are loaded. Their own libraries are found
  # by the loader, not by the linker.
  set_target_properties(moectl::libtorch PROPERTIES
    INTERFACE_LINK_LIBRARIES "-Wl,--no-as-needed;${TORCH_LIBRARIES};-Wl,--as-needed"
    INTERFACE_COMPILE_DEFINITIONS "USE_DISTRIBUTED;USE_C10D;USE_C10D_GLOO"
    INTERFACE_LINK_OPTIONS "LINKER:--allow-shlib-undefined"
    INTERFACE_INCLUDE_DIRECTORIES "${MOECTL_TORCH_FOLDER}/include;${MOECTL_TORCH_FOLDER}/include/torch/csrc/api/include")
endif()
