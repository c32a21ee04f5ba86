#include "chunk_plan.h"

#include <algorithm>

namespace samkernels {

ChunkPlan::ChunkPlan(const int64_t* numel, int64_t num_tensors, int64_t chunk_size)
    : chunk_size_(chunk_size) {
  first_chunk_.reserve(num_tensors + 1);
  first_chunk_.push_back(0);
  for (int64_t i = 0; i < num_tensors; ++i) {
    const int64_t full_chunks = numel[i] / chunk_size;
    const int64_t rest = numel[i] % chunk_size != 0;
    first_chunk_.push_back(first_chunk_.back() + full_chunks + rest);
    total_numel_ += numel[i];
  }
}

int64_t TensorOfChunk(const int64_t* first_chunk, int64_t num_tensors, int64_t chunk) {
  return std::upper_bound(first_chunk, first_chunk + num_tensors + 1, chunk) - first_chunk - 1;
}

}  // namespace samkernels
