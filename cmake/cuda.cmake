# The CUDA kernels of pyard_ops. TORCH_CUDA_ARCH_LIST, as torch's own extensions read it: "8.0;9.0+PTX".
set(PYARD_CUDA_ARCH_LIST "$ENV{TORCH_CUDA_ARCH_LIST}")
if(NOT PYARD_CUDA_ARCH_LIST)
  # Ampere and Hopper, and PTX for what comes after.
  set(PYARD_CUDA_ARCH_LIST "8.0;9.0+PTX")
endif()
string(REGEX REPLACE "[ ,]+" ";" PYARD_CUDA_ARCH_LIST "${PYARD_CUDA_ARCH_LIST}")
set(CMAKE_CUDA_ARCHITECTURES "")
foreach(arch IN LISTS PYARD_CUDA_ARCH_LIST)
  if(NOT arch MATCHES "^([0-9]+)\\.([0-9])(a?)(\\+PTX)?$")
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST has '${arch}', expected versions like 8.0 or 9.0+PTX")
  endif()
  set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3}")
  if("${CMAKE_MATCH_1}${CMAKE_MATCH_2}" LESS 80)
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST has '${arch}': the kernels need 8.0 or newer (cp.async, bf16)")
  endif()
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${number}-real)
  if(CMAKE_MATCH_4)
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${number}-virtual)
  endif()
endforeach()

enable_language(CUDA)
# torch brings a CUDA runtime of its own or none; with a static one this library needs nothing but the driver.
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set_target_properties(pyard_ops PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
if(CCACHE)
  set(CMAKE_CUDA_COMPILER_LAUNCHER "${CCACHE}")
endif()

add_library(pyard_cuda_kernels OBJECT
  csrc/cuda/block_attention_backward.cu
  csrc/cuda/block_attention_forward.cu
  csrc/cuda/gather_rows.cu
  csrc/cuda/gelu_tanh.cu
  csrc/cuda/residual_norm_backward.cu
  csrc/cuda/residual_norm_forward.cu
  csrc/cuda/timestep_embedding.cu)
target_include_directories(pyard_cuda_kernels PUBLIC csrc/cuda csrc/cuda/ptx)
# Registers and spills of every kernel, for csrc/cuda/check_spills.py.
target_compile_options(pyard_cuda_kernels PRIVATE -Xptxas=-v)
target_sources(pyard_ops PRIVATE
  csrc/cuda/block_attention.cpp
  csrc/cuda/library.cpp
  csrc/cuda/residual_norm.cpp
  csrc/cuda/small_operators.cpp
  csrc/cuda/stream.cpp)
list(JOIN PYARD_CUDA_ARCH_LIST " " PYARD_CUDA_ARCHS)
set_property(SOURCE csrc/library.cpp APPEND PROPERTY
  COMPILE_DEFINITIONS PYARD_HAS_CUDA "PYARD_CUDA_ARCHS=\"${PYARD_CUDA_ARCHS}\"")
target_link_libraries(pyard_ops PRIVATE pyard_cuda_kernels ${CMAKE_DL_LIBS})

# Every kernel without torch or Python, for compute-sanitizer: benchmarks/GPU.md.
if(EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/benchmarks/gpu_sanitize.cu")
  add_executable(pyard_gpu_sanitize EXCLUDE_FROM_ALL benchmarks/gpu_sanitize.cu)
  target_link_libraries(pyard_gpu_sanitize PRIVATE pyard_cuda_kernels)
endif()
