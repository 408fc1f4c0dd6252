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
set_target_properties(pyard_ops PROPERTIES
  CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}"
  CUDA_STANDARD 17
  CUDA_STANDARD_REQUIRED ON
  CUDA_VISIBILITY_PRESET hidden
  CUDA_RUNTIME_LIBRARY Static)
if(CCACHE)
  set(CMAKE_CUDA_COMPILER_LAUNCHER "${CCACHE}")
endif()

target_sources(pyard_ops PRIVATE
  csrc/cuda/block_attention.cpp
  csrc/cuda/block_attention_backward.cu
  csrc/cuda/block_attention_forward.cu
  csrc/cuda/gather_rows.cu
  csrc/cuda/library.cpp
  csrc/cuda/residual_norm.cpp
  csrc/cuda/residual_norm_backward.cu
  csrc/cuda/residual_norm_forward.cu
  csrc/cuda/small_operators.cpp
  csrc/cuda/stream.cpp
  csrc/cuda/timestep_embedding.cu)
list(JOIN PYARD_CUDA_ARCH_LIST " " PYARD_CUDA_ARCHS)
set_property(SOURCE csrc/library.cpp APPEND PROPERTY
  COMPILE_DEFINITIONS PYARD_HAS_CUDA "PYARD_CUDA_ARCHS=\"${PYARD_CUDA_ARCHS}\"")
target_include_directories(pyard_ops PRIVATE csrc/cuda csrc/cuda/ptx)
target_link_libraries(pyard_ops PRIVATE ${CMAKE_DL_LIBS})
# Registers and spills of every kernel, for csrc/cuda/check_spills.py.
set_property(TARGET pyard_ops APPEND PROPERTY COMPILE_OPTIONS "$<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v>")
