# The execution gate (CONTRIBUTING.md): csrc/cuda/*.cu compiled by the C++ compiler, and every
# tests/cuda/test_NAME.cpp as a test cuda_NAME that runs them on the CPU.
file(GLOB_RECURSE cuda_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cu)
file(GLOB cuda_tests CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/tests/cuda/test_*.cpp)
set_source_files_properties(${cuda_sources} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++")
set_source_files_properties(csrc/cuda/table.cu PROPERTIES
  COMPILE_DEFINITIONS ${RANDLORA_CUDA_INTERFACE})

add_library(cuda_on_cpu STATIC tests/cuda_on_cpu/engine.cpp tests/cuda_on_cpu/ptx_on_cpu.cpp)
target_include_directories(cuda_on_cpu PUBLIC csrc tests/cuda_on_cpu tests/cpp tests/cuda)
target_compile_options(cuda_on_cpu PUBLIC -O1 -Wno-unknown-pragmas)
target_compile_options(cuda_on_cpu PRIVATE -O2 -fno-sanitize=undefined)  # UBSan watches kernels
target_link_libraries(cuda_on_cpu PUBLIC ${CMAKE_DL_LIBS})

# A library, so that a test links the kernels it calls and no others.
add_library(randlora_cuda_on_cpu STATIC ${cuda_sources})
target_link_libraries(randlora_cuda_on_cpu PUBLIC cuda_on_cpu)
add_custom_target(cuda_tests)  # all of them

foreach(source ${cuda_tests})
  get_filename_component(name ${source} NAME_WE)
  string(REGEX REPLACE "^test_" "" name ${name})
  add_executable(test_cuda_${name} ${source})
  target_link_libraries(test_cuda_${name} PRIVATE randlora_cuda_on_cpu randlora_kernels
    Threads::Threads)
  add_dependencies(cuda_tests test_cuda_${name})
  add_test(NAME cuda_${name} COMMAND test_cuda_${name})
  set_tests_properties(cuda_${name} PROPERTIES FIXTURES_SETUP cuda_kernels
    ENVIRONMENT CUDA_ON_CPU_KERNELS=${CMAKE_CURRENT_BINARY_DIR}/kernels/${name}.txt)
endforeach()

# For Python tests (tools/cuda/run_python_tests.sh).
add_library(cuda_on_cpu_library SHARED EXCLUDE_FROM_ALL $<TARGET_OBJECTS:randlora_cuda_on_cpu>
  csrc/cuda/device/context.cpp)
set_target_properties(cuda_on_cpu_library PROPERTIES OUTPUT_NAME randlora_cuda_on_cpu)
target_link_libraries(cuda_on_cpu_library PRIVATE cuda_on_cpu Threads::Threads)
target_link_options(cuda_on_cpu_library PRIVATE LINKER:--no-undefined
  LINKER:--version-script=${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/exports.map)

# All tests together must have started every kernel there is. Those under TSan leave out float16's.
find_package(Python3 COMPONENTS Interpreter)
if(Python3_FOUND AND NOT RANDLORA_SANITIZE MATCHES thread)
  file(MAKE_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/kernels)
  add_test(NAME cuda_every_kernel COMMAND ${Python3_EXECUTABLE}
    ${CMAKE_CURRENT_SOURCE_DIR}/tools/cuda/every_kernel.py ${CMAKE_CURRENT_BINARY_DIR}/kernels)
  set_tests_properties(cuda_every_kernel PROPERTIES FIXTURES_REQUIRED cuda_kernels)
endif()
