# The CUDA library as setup.py builds it, of the same objects (build/nvcc): csrc/cuda/nvcc.py knows
# nvcc, flags and architectures (TORCH_CUDA_ARCH_LIST). The test cuda_library opens it, which needs no
# card.
#   -DRANDLORA_NVCC=ON requires nvcc, OFF leaves the library out, AUTO (default) builds it where nvcc is
set(RANDLORA_NVCC AUTO CACHE STRING "build librandlora_cuda.so with nvcc: AUTO, ON or OFF")
set_property(CACHE RANDLORA_NVCC PROPERTY STRINGS AUTO ON OFF)
if(RANDLORA_SANITIZE OR NOT RANDLORA_NVCC) # sanitizers do not reach into nvcc's work
  return()
endif()

find_program(RANDLORA_NVCC_PATH nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda
             PATH_SUFFIXES bin)
find_package(Python3 COMPONENTS Interpreter)
if(NOT RANDLORA_NVCC_PATH OR NOT Python3_FOUND)
  if(NOT RANDLORA_NVCC STREQUAL AUTO)
    message(FATAL_ERROR "RANDLORA_NVCC=${RANDLORA_NVCC} needs nvcc and python3")
  endif()
  message(STATUS "No CUDA library: nvcc or python3 was not found")
  return()
endif()

set(script ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/nvcc.py)
set(library ${CMAKE_CURRENT_BINARY_DIR}/librandlora_cuda.so)
file(GLOB sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cuda/*.cpp csrc/cuda/*.h csrc/core/*.h)
add_custom_command(
  OUTPUT ${library}
  COMMAND Python3::Interpreter ${script} --few ${library}
  DEPENDS ${script} ${sources} csrc/cuda/exports.map VERSION
  WORKING_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}
  COMMENT "librandlora_cuda.so by ${RANDLORA_NVCC_PATH}" USES_TERMINAL VERBATIM)
add_custom_target(randlora_cuda ALL DEPENDS ${library})

add_executable(test_cuda_library tests/cpp/test_cuda_library.cpp)
target_include_directories(test_cuda_library PRIVATE csrc)
target_compile_options(test_cuda_library PRIVATE ${interface})
target_link_libraries(test_cuda_library PRIVATE ${CMAKE_DL_LIBS})
add_dependencies(test_cuda_library randlora_cuda)
add_test(NAME cuda_library COMMAND test_cuda_library ${library} ${RANDLORA_VERSION})
