#include "import/formats.h"

#include <algorithm>
#include <cctype>
#include <string>

#include "moectl/tensorboard.h"

namespace moectl {

const std::vector<Format>& formats() {
  static const std::vector<Format> kFormats = {
      {.shown = {"sglang",
                 "CSV layer_id,expert_id,count of each rank, or the array logical_count as .npy or .npz"},
       .open = open_sglang,
       .loads = true},
      {.shown = {"vllm", "routed_experts [tokens, layers, k] as .npy, .npz or JSON lines"},
       .open = open_vllm,
       .zeros_for_dense = true},
      {.shown = {"megatron", "router_trace_rankN.jsonl, JSON lines with top_indices, or with tpe"},
       .open = open_megatron,
       .micro_batches = true},
      {.shown = {"hf", "router_logits [layers, tokens, experts] as .npy"},
       .open = open_router_logits,
       .micro_batches = true},
      {.shown = {"llama.cpp", "CSV layer,expert, a row for each choice"},
       .open = open_llama_cpp,
       .micro_batches = true},
      {.shown = {"wandb", "CSV export with a column for each layer and expert"},
       .open = open_wandb,
       .loads = true},
      {.shown = {"tensorboard", "event file with a scalar for each layer and expert"},
       .open = open_tensorboard,
       .loads = true},
      {.shown = {"csv", "matrix, a row a step, a column an expert"}, .open = open_matrix, .loads = true},
  };
  return kFormats;
}

std::string_view resembles(Bytes& file) {
  const std::string_view start = file.peek(4096);
  const auto holds = [&](std::string_view text) { return start.find(text) != start.npos; };
  if (start.starts_with("\x93NUMPY")) {
    if (holds("'<f") || holds("'>f")) return "hf";
    return holds("u1'") || holds("u2'") ? "vllm" : "sglang";
  }
  // torch.save writes a zip archive with the pickle data.pkl, and wrote a bare pickle before PyTorch 1.6.
  if (start.starts_with("PK\x03\x04")) {
    return holds("/data.pkl") ? "torch" : holds("logical_count") ? "sglang" : holds("experts") ? "vllm" : "";
  }
  if (start.starts_with("\x80\x02\x8a\x0a")) return "torch";
  if (start.starts_with('{')) {
    if (holds("\"format\":\"moectl-")) return "moectl";
    if (holds("indices\"") || holds("\"tpe\"")) return "megatron";
    return holds("experts\"") ? "vllm" : "";
  }
  if (start.size() >= 12) {
    std::uint32_t crc = 0;
    for (std::size_t i = 12; i-- > 8;) crc = crc << 8 | static_cast<unsigned char>(start[i]);
    if (crc == masked_crc32c(start.data(), 8)) return "tensorboard";
  }
  std::string line(start.substr(0, start.find('\n')));
  std::ranges::transform(line, line.begin(),
                         [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  const auto has = [&](std::string_view text) { return line.find(text) != line.npos; };
  if (has("layer_id,expert_id")) return "sglang";
  if (has("expert0") || has("expert_0") || (has("layer") && has("expert") && has("step"))) return "wandb";
  if (has("layer") && has("expert")) return has("count") ? "sglang" : "llama.cpp";
  // Numbers, with or without a line of names above them.
  const auto numbers = [](std::string_view text) {
    return text.find_first_of("0123456789") != text.npos && text.find_first_of(",;\t") != text.npos &&
           text.find_first_not_of("0123456789.,;\t -+e\r") == text.npos;
  };
  const std::string_view rest = start.substr(std::min(start.size(), line.size() + 1));
  return numbers(line) || numbers(rest.substr(0, rest.find('\n'))) ? "csv" : "";
}

}  // namespace moectl
