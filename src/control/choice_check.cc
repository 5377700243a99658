#include "control/choice_check.h"

#include <algorithm>
#include <cmath>

namespace moectl {
namespace {

// Of the bias, in squares: what differs by less is the bias, rounded or a step old.
constexpr double kNear = 0.25;
constexpr double kSurely = 0.0625;  // what differs by less is another cause, surely
// Of the largest score. A router in bfloat16 rounds a bias below the first away, and disturbs one below the second.
constexpr double kRounding = 0.004, kWellAbove = 0.02;

// The k largest of `row` are the chosen ones; ties may go either way.
bool chooses_largest(std::span<const float> row, std::span<const std::int64_t> chosen) {
  const auto is_chosen = [&](std::size_t i) {
    return std::find(chosen.begin(), chosen.end(), static_cast<std::int64_t>(i)) != chosen.end();
  };
  float least_chosen = INFINITY, most_other = -INFINITY;
  for (std::size_t i = 0; i < row.size(); ++i) {
    if (is_chosen(i)) {
      least_chosen = std::min(least_chosen, row[i]);
    } else {
      most_other = std::max(most_other, row[i]);
    }
  }
  return std::isfinite(least_chosen) && least_chosen >= most_other;
}

// Squares of d = biased - unbiased scores and of a bias b, without their means: a common shift changes no choice.
struct Squares {
  double dd = 0, db = 0, bb = 0, n = 0, largest = 0;
  double to_bias() const { return dd - 2 * db + bb; }
  double to_reverse() const { return dd + 2 * db + bb; }
  double square_of(double part) const { return n * part * part * largest * largest; }
  bool exceeds(double part) const { return bb > square_of(part); }
};

Squares compare(const ChoiceSample& sample, std::span<const double> bias) {
  Squares out;
  const std::size_t n = bias.size();
  for (std::size_t from = 0; from < sample.biased_scores.size(); from += n) {
    const std::span<const float> v = sample.biased_scores.subspan(from, n),
                                 s = sample.scores.subspan(from, n);
    double d_mean = 0, b_mean = 0, kept = 0;
    for (std::size_t i = 0; i < n; ++i) {
      if (!std::isfinite(v[i])) continue;
      d_mean += static_cast<double>(v[i]) - static_cast<double>(s[i]);
      b_mean += bias[i];
      kept += 1;
    }
    if (kept == 0) continue;
    d_mean /= kept;
    b_mean /= kept;
    for (std::size_t i = 0; i < n; ++i) {
      if (!std::isfinite(v[i])) continue;
      const double d = static_cast<double>(v[i]) - static_cast<double>(s[i]) - d_mean, b = bias[i] - b_mean;
      out.dd += d * d;
      out.db += d * b;
      out.bb += b * b;
      out.largest = std::max(out.largest, std::abs(static_cast<double>(v[i])));
    }
    out.n += kept;
  }
  return out;
}

WiringVerdict judge_bias(const ChoiceSample& sample, int layer, int layers, const BiasOf& bias_of) {
  const Squares own = compare(sample, bias_of(layer));
  if (!std::isfinite(own.dd) || !own.exceeds(kRounding)) return {};
  if (own.to_bias() <= kNear * own.bb) return {Wiring::kGood};
  if (own.dd <= std::min(kSurely * own.bb, own.square_of(kRounding))) return {Wiring::kNotAdded};
  if (own.to_reverse() <= kSurely * own.bb) return {Wiring::kWrongSign};
  for (int l = 0; l < layers; ++l) {
    const std::span<const double> bias = bias_of(l);
    if (bias.size() != bias_of(layer).size()) continue;  // of a layer with other experts
    const Squares other = compare(sample, bias);
    if (other.exceeds(kRounding) && other.to_bias() <= kSurely * other.bb) return {Wiring::kWrongLayer, l};
  }
  return own.exceeds(kWellAbove) ? WiringVerdict{Wiring::kOtherBias} : WiringVerdict{};
}

// That the router uses another bias than its layer's.
bool surely_wrong(Wiring what) {
  return what == Wiring::kNotAdded || what == Wiring::kWrongSign || what == Wiring::kWrongLayer;
}

std::string words(const WiringVerdict& verdict) {
  switch (verdict.what) {
    case Wiring::kUnknown:
    case Wiring::kGood:
    case Wiring::kFits:
      return "";
    case Wiring::kNotAdded:
      return "the router does not add the bias: add bias(layer), and no copy of it, "
             "to the scores before the choice of the k largest";
    case Wiring::kWrongSign:
      return "the router subtracts the bias: add it to the scores";
    case Wiring::kWrongLayer:
      return "the router adds the bias of layer " + std::to_string(verdict.other_layer) +
             ": give it the bias of its own layer";
    case Wiring::kOtherBias:
      return "the router adds something else than the bias in force: perhaps a copy that is not updated";
    case Wiring::kOtherChoice:
      return "the recorded experts are not the k largest of the recorded biased_scores: "
             "replayed or masked routes, or scores of another pass";
  }
  return "";
}

}  // namespace

WiringVerdict judge_choices(const ChoiceSample& sample, int top_k, int layer, int layers,
                            const BiasOf& bias_of) {
  const auto k = static_cast<std::size_t>(top_k);
  const std::size_t n = bias_of(layer).size(), tokens = sample.experts.size() / k;
  const auto nan = [](float x) { return std::isnan(x); };
  if (tokens == 0 || std::any_of(sample.biased_scores.begin(), sample.biased_scores.end(), nan)) return {};
  // A token with a slot that is not routed was not given its k largest.
  if (std::find(sample.experts.begin(), sample.experts.end(), -1) != sample.experts.end()) return {};
  for (std::size_t t = 0; t < tokens; ++t) {
    if (!chooses_largest(sample.biased_scores.subspan(t * n, n), sample.experts.subspan(t * k, k)))
      return {Wiring::kOtherChoice};
  }
  return sample.scores.empty() ? WiringVerdict{Wiring::kFits} : judge_bias(sample, layer, layers, bias_of);
}

std::string ChoiceCheck::observe(const WiringVerdict& verdict, std::int64_t step) {
  const Wiring what = verdict.what;
  if (what == Wiring::kUnknown) return "";
  if (what == Wiring::kGood || what == Wiring::kFits) {
    if (what == Wiring::kGood) seen_ = std::max(seen_, WiringSeen::kOwn);
    if (step != last_fault_ && step != last_good_ && ++good_ >= kClearSteps) steps_ = 0;
    last_good_ = step;
    return "";
  }
  seen_ = std::max(seen_, surely_wrong(what) ? WiringSeen::kOther : WiringSeen::kNoOther);
  // A layer that uses the bias of another seems to use none while the other's is zero: one fault, two verdicts.
  if (what != fault_ && !(surely_wrong(what) && surely_wrong(fault_))) steps_ = 0;
  fault_ = what;
  good_ = 0;
  if (step == last_fault_) return "";
  last_fault_ = step;
  return ++steps_ == kWiringSteps ? words(verdict) : "";
}

bool ChoiceCheck::told() const {
  return steps_ >= kWiringSteps && surely_wrong(fault_);
}

void WiringMemory::observe(WiringSeen seen) {
  if (seen != WiringSeen::kNothing) own_ = seen == WiringSeen::kOwn ? kRemembered : 0;
  if (seen == WiringSeen::kOther) {
    steps_ = std::min<std::int64_t>(steps_ + 1, kWiringSteps);
    good_ = quiet_ = 0;
  } else if (seen == WiringSeen::kNothing) {
    own_ = std::max<std::int64_t>(own_ - 1, 0);
    if (steps_ == 0 || ++quiet_ > kRemembered) steps_ = good_ = quiet_ = 0;
  } else if (steps_ == 0 || ++good_ >= kClearSteps) {
    steps_ = good_ = quiet_ = 0;
  }
}

void WiringMemory::exchange(StateIo& io) {
  io.value("wiring.steps", steps_, {0, kWiringSteps});
  io.value("wiring.good", good_, {0, kClearSteps - 1});
  io.value("wiring.quiet", quiet_, {0, kRemembered});
  io.value("wiring.own", own_, {0, kRemembered});
}

}  // namespace moectl
