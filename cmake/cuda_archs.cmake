# samkernels_choose_cuda_archs(<out>): SAMKERNELS_CUDA_ARCHS if given; else those of the GPUs that this machine
# shows; else the common ones that nvcc knows. PTX of 80 serves what lies between them, such as Jetson Orin (87) and
# Thor (110), which run no other machine code than their own; PTX of the last what comes after it.
function(samkernels_choose_cuda_archs out)
  if(SAMKERNELS_CUDA_ARCHS)
    string(REPLACE "," ";" archs "${SAMKERNELS_CUDA_ARCHS}")
    string(REPLACE " " ";" archs "${archs}")
    set(${out} ${archs} PARENT_SCOPE)
    return()
  endif()

  set(source ${CMAKE_CURRENT_BINARY_DIR}/visible_gpus.cu)
  file(WRITE ${source} "
#include <cstdio>
int main() {
  int count = 0;
  cudaGetDeviceCount(&count);
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) == cudaSuccess) {
      std::printf(\"%d%d;\", properties.major, properties.minor);
    }
  }
}
")
  execute_process(
    COMMAND ${CMAKE_CUDA_COMPILER} -o ${CMAKE_CURRENT_BINARY_DIR}/visible_gpus ${source}
    OUTPUT_QUIET ERROR_QUIET)
  execute_process(
    COMMAND ${CMAKE_CURRENT_BINARY_DIR}/visible_gpus OUTPUT_VARIABLE visible ERROR_QUIET)
  list(REMOVE_ITEM visible "")
  list(REMOVE_DUPLICATES visible)
  if(visible)
    list(TRANSFORM visible APPEND -real)
    set(${out} ${visible} PARENT_SCOPE)
    return()
  endif()

  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE known)
  set(archs "")
  foreach(arch 75 80 86 89 90 100 120)
    if(known MATCHES "compute_${arch}[^0-9]")
      list(APPEND archs ${arch}-real)
    endif()
  endforeach()
  list(GET archs -1 last)
  foreach(with_ptx 80-real ${last})
    string(REPLACE "-real" "" both ${with_ptx})
    list(TRANSFORM archs REPLACE "^${with_ptx}$" ${both})
  endforeach()
  set(${out} ${archs} PARENT_SCOPE)
endfunction()
