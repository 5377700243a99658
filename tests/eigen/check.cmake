# No function of Eigen is shared between the core and the program around it: the linker takes equal names for equal code.
# cmake -DNM=nm -DCORE=libmoectl_core.a -DPROGRAM=own_eigen -P check.cmake
function(eigen_of file)
  execute_process(COMMAND ${NM} --demangle --defined-only ${file} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[ (<,*&]Eigen::[^\n]*" found "${symbols}")
  list(LENGTH found count)
  message(STATUS "${file}: ${count} symbols with Eigen::")
  set(count ${count} PARENT_SCOPE)
  set(found "${found}" PARENT_SCOPE)
endfunction()

eigen_of(${PROGRAM})
if(count EQUAL 0)
  message(FATAL_ERROR "the program has no Eigen of its own: nothing is tested")
endif()
eigen_of(${CORE})
if(NOT count EQUAL 0)
  message(FATAL_ERROR "the core has Eigen under its public name: ${found}")
endif()
