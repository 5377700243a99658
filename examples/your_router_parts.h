// What your_router.cc has around its loop: synthetic data, options, and the printing of what the controller says.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moectl/torch/controller.h"

constexpr std::int64_t kVocabulary = 64, kSequences = 8, kLength = 32;

// ---- The data: tokens of a few Markov chains of very different size, in sequences of different length. ----

struct Batch {
  torch::Tensor tokens, next, mask;  // [B, S]; mask: true = a real token
};

class Chains {
 public:
  Chains() {
    torch::manual_seed(7);  // the chains belong to the task, not to the run
    for (int chain = 0; chain < 6; ++chain) {
      followers_.push_back(torch::randint(10 * chain, 10 * chain + 14, {kVocabulary, 4}));
    }
  }
  Batch draw() const {
    const auto whole = torch::dtype(torch::kLong);
    const torch::Tensor chain =
        torch::multinomial(torch::tensor({.5, .25, .12, .07, .04, .02}), kSequences, true);
    const torch::Tensor length = torch::randint(kLength / 2, kLength + 1, {kSequences, 1}, whole);
    std::vector<torch::Tensor> tokens = {torch::randint(kVocabulary, {kSequences}, whole)};
    const torch::Tensor followers = torch::stack(followers_).index_select(0, chain);  // [B, V, 4]
    const torch::Tensor row = torch::arange(kSequences, whole);
    while (tokens.size() <= kLength) {
      const torch::Tensor choice = torch::randint(4, {kSequences}, whole);
      tokens.push_back(followers.index({row, tokens.back(), choice}));
    }
    const torch::Tensor all = torch::stack(tokens, 1);
    return {all.narrow(1, 0, kLength), all.narrow(1, 1, kLength), torch::arange(kLength, whole).lt(length)};
  }

 private:
  std::vector<torch::Tensor> followers_;
};

/// The options of the command line and their defaults.
class Options {
 public:
  Options(int argc, char** argv) {
    for (int i = 1; i < argc; i += 2) {
      const auto known = values_.find(argv[i]);
      if (known == values_.end() || i + 1 == argc)
        throw std::invalid_argument(std::string(argv[i]) + ": unknown, or no value");
      known->second = argv[i + 1];
    }
    const std::string mistakes =
        " forget-bias wrong-layer wrong-sign swap-storage no-top-values shadow-then-active replayed-routes ";
    if (!text("--mistake").empty() && mistakes.find(' ' + text("--mistake") + ' ') == std::string::npos)
      throw std::invalid_argument("--mistake: unknown; one of" + mistakes);
  }
  const std::string& text(const std::string& name) const { return values_.at(name); }
  std::int64_t number(const std::string& name) const { return std::stoll(values_.at(name)); }

 private:
  std::map<std::string, std::string> values_ = {
      {"--steps", "300"}, {"--seed", "1"},  {"--policy", ""},  {"--log", ""},
      {"--save", ""},     {"--resume", ""}, {"--mistake", ""}, {"--mend-at", "1000000000"}};
};

// ---- What the controller says ----

/// Prints each alert and each reason of a layer when it first appears.
class Listener {
 public:
  void hear(const moectl::StepReport& report) {
    for (const moectl::Notice& notice : report.notices) {
      if (notice.step == report.step) say(notice.step, notice.layer, "NOTICE", notice.text);
    }
    for (const moectl::LayerReport& layer : report.layers) {
      for (const std::string_view alert : layer.monitor->alerts())
        say(report.step, layer.layer, "alert", alert);
      const moectl::ActuatorReport& bias = layer.actuators[0];
      for (int r = 0; r < moectl::kReasonCount; ++r) {
        const auto reason = static_cast<moectl::Reason>(r);
        if (bias.reasons.has(reason)) say(report.step, layer.layer, "reason", moectl::name_of(reason));
      }
    }
  }

 private:
  void say(std::int64_t step, int layer, const char* kind, std::string_view what) {
    const std::string words = std::string(kind) + ": " + std::string(what);
    if (heard_.emplace(layer, words).second)
      std::printf("step %3lld  layer %d  %s\n", static_cast<long long>(step), layer, words.c_str());
  }
  std::set<std::pair<int, std::string>> heard_;
};

/// Balance of the last steps against the floor: 1 = as even as chance allows.
inline void print_balance(const moectl::StepReport& report) {
  for (const moectl::LayerReport& layer : report.layers) {
    const moectl::Metrics& smoothed = layer.monitor->smoothed();
    const moectl::FloorInForce floor = moectl::floor_of(smoothed);
    const double vio = smoothed.max_vio.value_or(NAN);
    double spread = 0;
    for (const double b : layer.actuators[0].applied) spread = std::max(spread, std::abs(b));
    std::printf("layer %d: MaxVio %.3f: %.2f x its %s; largest bias %.3f; %s\n", layer.layer, vio,
                vio / floor.max_vio.value_or(NAN), std::string(floor.name()).c_str(), spread,
                std::string(moectl::name_of(layer.monitor->health())).c_str());
  }
}
