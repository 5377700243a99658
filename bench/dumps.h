// Dumps in the shapes that other systems write, for the imported rows of placement_table. Their data are ours: the simulated router's
// choices, or the choices that a training run recorded. The shapes are those of docs/import.md, with its sources.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dumps {

/// What `moectl import FORMAT FILES --top-k K` reads; k = 0: the dump says it.
struct Dump {
  std::string name, format;
  std::vector<std::string> files;
  int top_k = 0;
};

/// SGLang's `logical_count` of a served model: two layers × 128 experts, top-8, balanced in training. Each step has another mixture
/// of eight domains.
Dump sglang_counts(const std::string& folder, std::int64_t steps);
/// vLLM's `routed_experts` of a served model: two layers × 64 experts, top-6, balanced in training; eight requests of 128 tokens a
/// step. From a quarter on, half of the requests are of a domain that was absent.
Dump vllm_responses(const std::string& folder, std::int64_t steps);
/// Megatron-LM's router trace of a training run without control whose data keep moving: two layers × 32 experts, top-4, data
/// parallelism over two groups of two ranks of tensor parallelism, which hold the same tokens.
Dump megatron_traces(const std::string& folder, std::int64_t steps);
/// SGLang's `logical_count` of the model that wrote the run log `path`, as if it were served: each step joins the choices for four
/// batches of one domain, recorded in the last quarter of the run. Which domain is asked for changes slowly.
Dump sglang_served(const std::string& folder, const std::string& path, std::int64_t steps);

}  // namespace dumps
