#include "dumps.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <random>
#include <span>
#include <stdexcept>

#include "moectl/run_log.h"
#include "moectl/simulation.h"

namespace dumps {
namespace {

using moectl::SimulatedRouter;
using moectl::SimulationOptions;

/// The bytes of a .npy array, version 1.
std::string npy(const std::string& type, const std::string& shape, const std::string& data) {
  std::string header = "{'descr': '" + type + "', 'fortran_order': False, 'shape': (" + shape + "), }";
  header.resize((header.size() + 11 + 63) / 64 * 64 - 11, ' ');
  header += '\n';
  std::string bytes("\x93NUMPY\x01\x00", 8);
  bytes += static_cast<char>(header.size() & 255);
  bytes += static_cast<char>(header.size() >> 8);
  return bytes + header + data;
}

std::string base64(const std::string& bytes) {
  constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    std::uint32_t three = 0;
    for (std::size_t j = 0; j < 3; ++j)
      three = three << 8 | (i + j < bytes.size() ? static_cast<unsigned char>(bytes[i + j]) : 0U);
    for (std::size_t j = 0; j < 4; ++j)
      text += i + j <= bytes.size() ? kDigits[three >> (18 - 6 * j) & 63] : '=';
  }
  return text;
}

void append_i4(std::string& data, std::int64_t value) {
  for (int byte = 0; byte < 4; ++byte) data += static_cast<char>(value >> (8 * byte) & 255);
}

void write(const std::string& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary);
  file << bytes;
  file.close();
  if (!file) throw std::runtime_error(path + ": cannot be written");
}

/// Layers of one model, which share their tokens.
class Model {
 public:
  /// `served`: nothing trains any more, and biases have made the loads even on the mixture of the training data.
  Model(const SimulationOptions& options, int layers, bool served) : options_(options) {
    constexpr int kTraining = 400;
    constexpr double kBiasStep = 0.005;
    if (served) {
      options_.forming = options_.task_pull = options_.rich = options_.affinity_walk = 0;
    }
    const auto n = static_cast<std::size_t>(options_.experts);
    for (int layer = 0; layer < layers; ++layer) {
      std::vector<double>& bias = biases_.emplace_back(n, 0.0);
      if (served) {
        SimulationOptions even = options_;
        even.mixture_spread = 0;
        even.event_step = kTraining;
        SimulatedRouter router(even, layer);
        for (int step = 0; step < kTraining; ++step) {
          const auto counts = counted(router.route(bias).experts);
          const double mean = static_cast<double>(options_.tokens * options_.top_k) / static_cast<double>(n);
          for (std::size_t i = 0; i < n; ++i) {
            const double less = mean - static_cast<double>(counts[i]);
            bias[i] += less > 0 ? kBiasStep : less < 0 ? -kBiasStep : 0;
          }
        }
      }
      routers_.emplace_back(options_, layer);
    }
  }
  std::size_t layers() const { return routers_.size(); }
  /// The experts of the next batch's tokens in a layer [tokens × k].
  std::span<const std::int64_t> route(std::size_t layer) {
    return routers_[layer].route(biases_[layer]).experts;
  }
  std::vector<std::int64_t> counted(std::span<const std::int64_t> experts) const {
    std::vector<std::int64_t> counts(static_cast<std::size_t>(options_.experts), 0);
    for (const std::int64_t expert : experts) ++counts[static_cast<std::size_t>(expert)];
    return counts;
  }

 private:
  SimulationOptions options_;
  std::vector<std::vector<double>> biases_;
  std::vector<SimulatedRouter> routers_;
};

}  // namespace

Dump sglang_counts(const std::string& folder, std::int64_t steps) {
  SimulationOptions options;
  options.experts = 128;
  options.top_k = 8;
  options.sequence_length = 64;
  options.domains = 8;
  options.mixture_spread = 1;
  Model model(options, 2, true);
  std::string data;
  for (std::int64_t step = 0; step < steps; ++step) {
    for (std::size_t layer = 0; layer < model.layers(); ++layer) {
      for (const std::int64_t count : model.counted(model.route(layer))) append_i4(data, count);
    }
  }
  const std::string path = folder + "/logical_count.npy";
  write(path, npy("<i4", std::to_string(steps) + ", 2, 128", data));
  return {"SGLang `logical_count`, served, mixture drawn anew each step", "sglang", {path}, 8};
}

Dump vllm_responses(const std::string& folder, std::int64_t steps) {
  constexpr std::size_t kRequest = 128, kTopK = 6;
  SimulationOptions options;
  options.experts = 64;
  options.top_k = kTopK;
  options.tokens = 1024;
  options.sequence_length = kRequest;
  options.scenario = moectl::Scenario::kShift;
  options.event_step = steps / 4;
  Model model(options, 2, true);
  std::string lines;
  for (std::int64_t step = 0; step < steps; ++step) {
    std::vector<std::vector<std::int64_t>> chosen;
    for (std::size_t layer = 0; layer < model.layers(); ++layer) {
      const auto experts = model.route(layer);
      chosen.emplace_back(experts.begin(), experts.end());
    }
    const std::size_t tokens = chosen[0].size() / kTopK;
    for (std::size_t first = 0; first < tokens; first += kRequest) {
      std::string data;  // [tokens, layers, k]
      for (std::size_t t = first; t < first + kRequest; ++t) {
        for (const auto& layer : chosen) {
          for (std::size_t j = 0; j < kTopK; ++j) data += static_cast<char>(layer[t * kTopK + j]);
        }
      }
      lines += R"({"choices": [{"index": 0, "routed_experts": ")" +
               base64(npy("|u1", std::to_string(kRequest) + ", 2, " + std::to_string(kTopK), data)) +
               "\"}]}\n";
    }
  }
  const std::string path = folder + "/responses.jsonl";
  write(path, lines);
  return {"vLLM `routed_experts`, served, shift", "vllm", {path}, 0};
}

Dump megatron_traces(const std::string& folder, std::int64_t steps) {
  constexpr std::size_t kTopK = 4;
  SimulationOptions options;
  options.experts = 32;
  options.top_k = kTopK;
  options.tokens = 1024;
  options.scenario = moectl::Scenario::kDrift;
  options.event_step = steps / 4;
  Model model(options, 2, false);
  Dump dump{"Megatron-LM router trace of 4 ranks, training, no control, drift", "megatron", {}, 0};
  std::string of_group[2];
  for (std::int64_t step = 0; step < steps; ++step) {
    for (std::size_t layer = 0; layer < model.layers(); ++layer) {
      const auto experts = model.route(layer);
      const std::size_t half = experts.size() / kTopK / 2;
      for (std::size_t group = 0; group < 2; ++group) {
        std::string& text = of_group[group];
        text += "{\"step\": " + std::to_string(step) +
                R"(, "stage": "pre_dispatch", "block": "decoder", "layer": )" + std::to_string(layer) +
                ", \"num_tokens\": " + std::to_string(half) + ", \"topk\": " + std::to_string(kTopK) +
                ", \"top_indices\": [";
        for (std::size_t t = group * half; t < (group + 1) * half; ++t) {
          text += t > group * half ? ", [" : "[";
          for (std::size_t j = 0; j < kTopK; ++j)
            text += (j > 0 ? ", " : "") + std::to_string(experts[t * kTopK + j]);
          text += ']';
        }
        text += "]}\n";
      }
    }
  }
  for (std::size_t rank = 0; rank < 4; ++rank) {
    dump.files.push_back(folder + "/router_trace_rank" + std::to_string(rank) + ".jsonl");
    write(dump.files.back(), of_group[rank / 2]);
  }
  return dump;
}

Dump sglang_served(const std::string& folder, const std::string& path, std::int64_t steps) {
  // By step, layer and domain: counts [N].
  std::map<std::int64_t, std::map<int, std::vector<std::vector<std::int64_t>>>> recorded;
  int top_k = 0;
  moectl::LogReader log(path, moectl::FaultPolicy::kRepair);
  while (const auto record = log.next()) {
    if (record->layer < 0 || record->tag != "train" || record->domains.empty()) continue;
    top_k = record->stats.top_k();
    auto& domains = recorded[record->step][record->layer];
    for (int d = 0; d < static_cast<int>(record->domains.size()); ++d) {
      const auto counts = record->stats.domain_counts(d);
      domains.emplace_back(counts.begin(), counts.end());
    }
  }
  if (recorded.empty()) throw std::runtime_error(path + ": no record has domain_counts");
  std::vector<std::int64_t> late;
  for (const auto& [step, layers] : recorded) late.push_back(step);
  late.erase(late.begin(), late.begin() + static_cast<std::ptrdiff_t>(late.size() * 3 / 4));
  const auto& first = recorded.at(late[0]);
  const std::size_t domains = first.begin()->second.size(), experts = first.begin()->second[0].size();
  std::mt19937_64 random(1);
  std::string data;
  for (std::int64_t step = 0; step < steps; ++step) {
    // The domain that is asked for most goes round once in 150 steps.
    std::vector<double> shares;
    for (std::size_t d = 0; d < domains; ++d) {
      const double angle =
          2 * std::acos(-1.0) *
          (static_cast<double>(step) / 150 + static_cast<double>(d) / static_cast<double>(domains));
      shares.push_back(std::exp(1.5 * std::cos(angle)));
    }
    std::vector<std::int64_t> counts(first.size() * experts, 0);
    for (int batch = 0; batch < 4; ++batch) {
      double at = 0, u = static_cast<double>(random() >> 11) * 0x1p-53;
      for (const double share : shares) at += share;
      u *= at;
      std::size_t domain = 0;
      while (domain + 1 < domains && u >= shares[domain]) u -= shares[domain++];
      const auto& layers = recorded.at(late[random() % late.size()]);
      std::size_t to = 0;
      for (const auto& [layer, of_domain] : layers) {
        for (const std::int64_t count : of_domain[domain]) counts[to++] += count;
      }
    }
    for (const std::int64_t count : counts) append_i4(data, count);
  }
  const std::string name = path.substr(path.find_last_of('/') + 1);
  const std::string file = folder + "/served_" + name + ".npy";
  write(
      file,
      npy("<i4", std::to_string(steps) + ", " + std::to_string(first.size()) + ", " + std::to_string(experts),
          data));
  return {"SGLang `logical_count`, choices recorded in " + name + ", domains come and go",
          "sglang",
          {file},
          top_k};
}

}  // namespace dumps
