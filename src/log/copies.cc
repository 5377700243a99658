#include "log/copies.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "moectl/run_log.h"

namespace moectl {
namespace {

constexpr double kChance = -13.8;  // log of 1e-6

double log_factorial(std::int64_t n) {
  return std::lgamma(static_cast<double>(n) + 1);
}

std::int64_t added(std::int64_t a, std::int64_t b) {
  std::int64_t sum = 0;
  return __builtin_add_overflow(a, b, &sum) ? std::numeric_limits<std::int64_t>::max() : sum;
}

/// Whether two ranks chose the same in the layers that both have; nothing if there is none, or both chose nothing. Sums of scores are not asked: copies
/// may compute a last bit in another way. A layer may be missing, as at the end of a file that is still written.
std::optional<bool> same_choices(const std::vector<RankLayer>& a, const std::vector<RankLayer>& b) {
  std::optional<bool> same;
  for (auto x = a.begin(), y = b.begin(); x != a.end() && y != b.end();) {
    if (x->key != y->key) {
      ++(x->key < y->key ? x : y);
      continue;
    }
    const auto idle = [](const RankLayer& layer) {
      return std::ranges::all_of(layer.counts, [](std::int64_t count) { return count == 0; });
    };
    if (!idle(*x) || !idle(*y)) {
      same = x->top_k == y->top_k && x->tokens == y->tokens && std::ranges::equal(x->counts, y->counts);
      if (!*same) return same;
    }
    ++x;
    ++y;
  }
  return same;
}

}  // namespace

std::size_t RankCopies::add(std::string name) {
  const std::size_t place = names_.size();
  names_.push_back(std::move(name));
  met_.emplace_back(place, false);
  differ_.emplace_back(place, false);
  layers_.emplace_back();
  told_.push_back(false);
  first_.push_back(place);
  return place;
}

void RankCopies::see(std::int64_t step, const std::vector<std::vector<RankLayer>>& ranks) {
  std::vector<bool> has_copy(ranks.size());
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      if (differ_[i][j]) continue;
      // Copies of a third rank are compared with that one.
      if (first_[i] == first_[j] && first_[j] != j && !ranks[first_[j]].empty()) continue;
      const std::optional<bool> same = same_choices(ranks[i], ranks[j]);
      if (!same) continue;
      if (*same) {
        met_[i][j] = has_copy[i] = has_copy[j] = true;
        continue;
      }
      differ_[i][j] = true;
      if (met_[i][j] && told_[i] && told_[j])
        throw LogError("step " + std::to_string(step) + ": ranks " + names_[j] + " and " + names_[i] +
                       " differ, though they hold the same counts in all steps before, as copies of the same "
                       "tokens do: " +
                       advice_);
    }
  }
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    if (has_copy[i] && !told_[i]) learn(i, ranks[i]);
  }
  group();
}

void RankCopies::learn(std::size_t place, const std::vector<RankLayer>& layers) {
  for (const RankLayer& layer : layers) {
    Choices& of = layers_[place][{layer.key.first, std::string(layer.key.second)}];
    of.counts.resize(std::max(of.counts.size(), layer.counts.size()));
    std::int64_t sum = 0;
    for (std::size_t e = 0; e < layer.counts.size(); ++e) {
      sum = added(sum, layer.counts[e]);
      of.counts[e] = added(of.counts[e], layer.counts[e]);
      of.orders -= log_factorial(layer.counts[e]);
    }
    of.orders += log_factorial(sum);
  }
  if (chance(place) >= kChance) return;
  told_[place] = true;
  layers_[place].clear();
}

/// The log of the chance that independent tokens, chosen with the shares of all steps, make the counts of each step:
/// Σ over layers of Σ_steps log(T! / Π c_i!) + Σ_i C_i log(C_i / C).
double RankCopies::chance(std::size_t place) const {
  double sum = 0;
  for (const auto& [key, of] : layers_[place]) {
    double all = 0;
    for (const std::int64_t count : of.counts) all += static_cast<double>(count);
    sum += of.orders;
    for (const std::int64_t count : of.counts) {
      if (count > 0) sum += static_cast<double>(count) * std::log(static_cast<double>(count) / all);
    }
  }
  return sum;
}

/// Whether there is nothing to add up of a rank that is not told.
bool RankCopies::nothing(std::size_t place) const {
  return std::ranges::all_of(layers_[place], [](const auto& entry) {
    return std::ranges::all_of(entry.second.counts, [](std::int64_t count) { return count == 0; });
  });
}

void RankCopies::group() {
  open_.reset();
  for (std::size_t i = 0; i < names_.size(); ++i) {
    first_[i] = i;
    for (std::size_t j = 0; j < i; ++j) {
      if (!met_[i][j] || differ_[i][j]) continue;
      if (told_[i] && told_[j]) {
        if (first_[i] != i) continue;  // compared already with all that are like the first
        first_[i] = first_[j];
        for (std::size_t other = 0; other < i; ++other) {
          if (first_[other] == first_[i] && differ_[i][other])
            throw LogError("ranks " + names_[other] + " and " + names_[i] + " differ, and rank " + names_[j] +
                           " holds the same counts as both wherever they can be compared, so whose copy it "
                           "is cannot be told: " +
                           advice_);
        }
      } else if (!open_ && (told_[i] || !nothing(i)) && (told_[j] || !nothing(j))) {
        open_ = {i, j};
      }
    }
  }
}

void RankCopies::decide() const {
  if (!open_) return;
  throw LogError("ranks " + names_[open_->second] + " and " + names_[open_->first] +
                 " hold the same counts, of too few tokens to tell copies of the same tokens (tensor "
                 "parallelism) from chance: " +
                 advice_);
}

bool RankCopies::several() const {
  return std::ranges::any_of(first_, [](std::size_t first) { return first != 0; });
}

std::string RankCopies::note() const {
  constexpr std::size_t kShown = 4;
  std::vector<std::string> groups(names_.size());
  for (std::size_t i = 0; i < names_.size(); ++i) {
    if (first_[i] == i) continue;
    std::string& group = groups[first_[i]];
    if (group.empty()) group = names_[first_[i]];
    group += ' ' + names_[i];
  }
  std::erase(groups, "");
  std::string text;
  for (std::size_t i = 0; i < std::min(groups.size(), kShown); ++i) text += (i ? ", " : "") + groups[i];
  if (groups.size() > kShown) text += ", ...";
  return text.empty()
             ? ""
             : "ranks that hold the same counts are taken once, as copies of the same tokens: " + text;
}

}  // namespace moectl
