#include "control/config_comparison.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace moectl {

void ConfigComparison::look(const ModelConfig& model, std::span<const double> targets, std::int64_t step,
                            Notices& notices) {
  const auto say = [&](std::initializer_list<std::string_view> parts) {
    notices.add(NoticeKind::kConfig, -1, step, parts);
  };
  const RoutingStats* first = nullptr;
  bool same = layers_.size() > 1;
  std::int64_t fewest = std::numeric_limits<std::int64_t>::max();
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const RoutingStats* const stats = layers_[l].stats;
    if (stats == nullptr) {
      same = false;
      continue;
    }
    tokens_[l] += stats->tokens();
    const auto counts = stats->counts();
    fewest = std::min(fewest, stats->tokens());
    same = same && (first == nullptr || std::equal(counts.begin(), counts.end(), first->counts().begin()));
    first = first == nullptr ? stats : first;
    for (int i = model.experts - 1; i > last_used_expert_; --i) {
      if (counts[static_cast<std::size_t>(i)] > 0) last_used_expert_ = i;
    }
  }
  if (first == nullptr) return;
  // A router of zeros sends all tokens of all layers to the same k experts.
  const auto counts = first->counts();
  const auto used = std::count_if(counts.begin(), counts.end(), [](std::int64_t n) { return n > 0; });
  same_experts_ &= same && used > model.top_k;
  fewest_tokens_ += fewest;
  const std::int64_t stated = model.tokens_per_step, tokens = first->tokens();
  if (!std::exchange(tokens_compared_, true) && stated > 0 && (tokens > 2 * stated || tokens < stated / 2)) {
    say({"model.tokens_per_step is ", Number(stated).text(), ", and ", Number(tokens).text(),
         " tokens arrived: noise floors of targets are computed from it"});
  }
  if (++steps_ < kSteps) return;
  say_missing_layer(model, step, notices);
  if (same_experts_) {
    say(
        {"all layers have recorded the same experts in every step so far: a layer's record must hold the "
         "indices of that layer alone, [tokens, k] or [B, S, k], not [tokens, layers, k]"});
  }
  say_unused_experts(model, targets, step, notices);
}

// A layer that records under the id of another leaves its own without tokens, and gives the other twice as many.
void ConfigComparison::say_missing_layer(const ModelConfig& model, std::int64_t step,
                                         Notices& notices) const {
  const auto missing = std::find(tokens_.begin(), tokens_.end(), 0);
  if (missing == tokens_.end()) return;
  const auto id_of = [&](auto at) {
    return Number(std::int64_t{layers_[static_cast<std::size_t>(at - tokens_.begin())].id});
  };
  const auto most = std::max_element(tokens_.begin(), tokens_.end());
  const auto least = std::min_element(tokens_.begin(), tokens_.end(), [](std::int64_t a, std::int64_t b) {
    return a > 0 && (b == 0 || a < b);
  });
  if (*most >= 2 * *least) {
    notices.add(NoticeKind::kConfig, -1, step,
                {"layer ", id_of(missing).text(), " has recorded no token so far, and layer ",
                 id_of(most).text(), " twice as many as layer ", id_of(least).text(),
                 ": does it record under the id of layer ", id_of(most).text(), "?"});
    return;
  }
  notices.add(NoticeKind::kConfig, -1, step,
              {"layer ", id_of(missing).text(),
               " has recorded no token so far and other layers have: model.layers is ",
               Number(std::int64_t{model.layers}).text(), ": is every MoE layer recorded, from layer ",
               Number(std::int64_t{layers_.front().id}).text(), " on?"});
}

// The last experts of all layers, without a single token though there were enough for many each.
void ConfigComparison::say_unused_experts(const ModelConfig& model, std::span<const double> targets,
                                          std::int64_t step, Notices& notices) const {
  const int used = last_used_expert_ + 1;
  constexpr std::int64_t kEnough = 64;
  if (used >= model.experts || fewest_tokens_ * model.top_k < kEnough * model.experts) return;
  for (int i = used; i < model.experts; ++i) {
    if (targets[static_cast<std::size_t>(i)] <= 0) return;  // not wanted, not used
  }
  notices.add(NoticeKind::kConfig, -1, step,
              {"no layer has selected an expert from ", Number(std::int64_t{used}).text(),
               " on so far: model.experts is ", Number(std::int64_t{model.experts}).text(),
               ": does the router have fewer?"});
}

}  // namespace moectl
