// Cuts a list of tensors into chunks, on the host.
#pragma once

#include <cstdint>
#include <vector>

namespace samkernels {

// Tensor i is cut into ceil(numel[i] / chunk_size) chunks; chunks are numbered through all tensors:
// those of tensor i are first_chunk[i] .. first_chunk[i + 1] - 1. An empty tensor has none.
class ChunkPlan {
 public:
  ChunkPlan(const int64_t* numel, int64_t num_tensors, int64_t chunk_size);

  const int64_t* first_chunk() const { return first_chunk_.data(); }  // [num_tensors + 1]
  int64_t chunk_size() const { return chunk_size_; }
  int64_t num_chunks() const { return first_chunk_.back(); }
  int64_t total_numel() const { return total_numel_; }

 private:
  std::vector<int64_t> first_chunk_;
  int64_t chunk_size_;
  int64_t total_numel_ = 0;
};

// Returns the tensor that holds `chunk`: the last i with first_chunk[i] <= chunk.
int64_t TensorOfChunk(const int64_t* first_chunk, int64_t num_tensors, int64_t chunk);

}  // namespace samkernels
