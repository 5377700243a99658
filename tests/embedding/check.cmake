# Installs the build into a folder of its own, builds the project PROJECT against it and runs the result.
# cmake -DBUILD=build/release -DWORK=scratch -DPROJECT=core -P check.cmake
function(run)
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${ARGV}\nfailed with ${status}:\n${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

file(REMOVE_RECURSE ${WORK})
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/prefix)
run(${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR}/${PROJECT} -B ${WORK}/build -G Ninja
    -DCMAKE_PREFIX_PATH=${WORK}/prefix -DCMAKE_BUILD_TYPE=Release "-DCMAKE_CXX_FLAGS=${FLAGS}")
run(${CMAKE_COMMAND} --build ${WORK}/build)
run(${WORK}/build/embeds_${PROJECT})
if(PROJECT STREQUAL "core")
  run(ldd ${WORK}/build/embeds_core)
  if(output MATCHES "libtorch|libc10")
    message(FATAL_ERROR "embeds_core links LibTorch:\n${output}")
  endif()
endif()
