# Where neither Chart.js nor CLI11 is installed, moectl is configured without its tool, and with it is not.
include(${CMAKE_CURRENT_LIST_DIR}/run.cmake)
file(REMOVE_RECURSE ${WORK})
set(configure ${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR}/../.. -G Ninja -DCMAKE_CXX_COMPILER=${CXX}
    -DMOECTL_TORCH=OFF -DMOECTL_BENCHMARKS=OFF -DCMAKE_IGNORE_PATH=/usr/share/javascript/chart.js)
run(${configure} -B ${WORK}/off -DMOECTL_TOOL=OFF -DCMAKE_DISABLE_FIND_PACKAGE_CLI11=ON)
if(NOT output MATCHES "MOECTL_TOOL is off")
  message(FATAL_ERROR "Nothing said that tests are left out:\n${output}")
endif()
execute_process(COMMAND ${configure} -B ${WORK}/on RESULT_VARIABLE status ERROR_VARIABLE output OUTPUT_QUIET)
if(status EQUAL 0 OR NOT output MATCHES "Debian[ \n]+packages[^:]*:[ \n]+libjs-chart.js")
  message(FATAL_ERROR "Chart.js was not hidden, so this test shows nothing:\n${output}")
endif()
