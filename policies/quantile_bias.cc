// quantile_bias: moves every bias towards the value at which its expert would have had its target load in the last
// window.
//
//   d_ti = θ_t - v_ti         margin: how much the bias of i must rise for token t to choose i; v biased scores
//   q_i  = Q(d_·i, w_i kT)    the move at which w_i kT tokens have a negative margin, w_i the target share
//   b_i ← b_i + gain · q_i,   b -= mean(b)
//
//   exact:      θ_t = v_(k+1), the runner-up's score; Q the (⌊w_i kT⌋ + 1)-th smallest margin
//   histogram:  θ_t = (v_k + v_(k+1))/2; Q by counts in bins, linear within one (margins.h)
//   k3:         b_i ← the w_i kT-th smallest of r_ti = θ_t - s_ti, θ_t = v_(k+1), s unbiased scores; mean out
//
// There is no step size, because the layer's own scores give the distance to go. If the other biases and the thresholds
// did not change, one full step would balance the batch that it came from. But all biases move at once (a Jacobi
// iteration on the dual of the assignment problem), and the next batch has other tokens, so a full step adds the
// sampling noise of one batch to the next. `gain` is the part of the distance that one decision covers, which makes b
// an exponential average over batches. At 0.3 it adds g/(2 - g), a sixth, of the variance that full steps add.
//
// With `model.delay`, the margins belong to the biases of earlier decisions, and q is counted from those:
//   b_i ← b_i + gain · (b_i then + q_i - b_i)
// The aim, b_i then + q_i, does not depend on the bias in force, so late margins do not make the loop oscillate.
//
// Sources: Su, kexue.fm 11619, and openathena.ai/blog/quantile-balancing (exact form, an EMA of 0 to .9); the
// Kimi K3 technical report, section 2.3.3 and appendix D, and Megatron-LM (histograms of required biases,
// summed over ranks, gain 1). Their histograms are uniform over a range of scores; the ones here follow the
// scale of the margins.
//
// `k3` is the published form to the bit, for a run that must match one of Kimi K3: r is counted in 1000 equal bins over
// [min b - 1, max b + 1], the bin ⌊1000 (r - low)/(high - low)⌋ and never beyond the outer ones; the first bin at which
// the sum reaches w_i kT (not rounded) is taken, linear within it; the bias is replaced. (The report's appendix D; the
// details as in torchtitan's QuantileBalancer, pull request 4577.) Scores must lie within [0, 1], or the bins miss them.
//
// Forms. `histogram` adds 128 integers per expert to the payload. `exact` keeps every margin of the step: it needs all
// tokens in one process, rejects a reduction, and uses tokens × experts floats per layer; so does `k3`, whose counts (1000
// integers an expert) are not part of the payload. In `exact` a runner-up's
// margin is 0, so an expert that lacks no more tokens than it is runner-up of does not move, except by centring.
// Therefore the form moves about half as far as its gain says: at 0.3 it follows a drifting router as the histogram
// does at 0.15 (simulated router, steps 50 to 150: 1.3 and 1.35 times the floor), and 0.6 suits it better (1.2).
//
// Limitations
// - It needs all scores of the router, not only the largest k+1.
// - If many tokens have nearly the same margin, the quantile lies at the edge of such a cluster and jumps across it.
// - With k = N there are no margins, and biases do not move.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "base/lanes.h"
#include "policies/builtin.h"

namespace moectl::policies {
namespace {

struct Options {
  std::string form = "histogram";
  double gain = 0.3;

  static Options from(const PolicyOptions& o) { return {.form = o.text("form"), .gain = o.number("gain")}; }
};

class QuantileBias final : public Policy {
 public:
  QuantileBias(const Options& options, const PolicyContext& context)
      : k3_(options.form == "k3"),
        exact_(options.form == "exact"),
        gain_(options.gain),
        experts_(static_cast<std::size_t>(context.experts)),
        delay_(static_cast<std::size_t>(context.delay)),
        routed_under_(delay_ * experts_, 0.0),
        quantiles_(experts_, 0.0),
        bins_(k3_ ? kBins : 0, 0),
        required_(k3_ ? experts_ : 0, 0.0) {}

  StatsNeeds needs() const override { return {.margins = !(exact_ || k3_), .margin_rows = exact_ || k3_}; }

  void propose(const LayerView& layer, std::span<double> bias) override {
    const bool known = exact_ || k3_ ? layer.stats.has_margin_rows() : layer.stats.has_margins();
    if (k3_) {
      if (known) find_required(layer, routed_under(bias));
      if (delay_ > 0) count_from_then(bias);
      if (known) std::copy(required_.begin(), required_.end(), bias.begin());
    } else {
      for (std::size_t i = 0; i < experts_; ++i) quantiles_[i] = known ? quantile(layer, i) : 0;
      if (delay_ > 0) count_from_then(bias);
      if (known) {
        for (std::size_t i = 0; i < experts_; ++i) bias[i] += gain_ * quantiles_[i];
      }
    }
    if (!known) return;
    const double mean = sum_of(bias) / static_cast<double>(experts_);
    for (double& b : bias) b -= mean;
  }

  void exchange(StateIo& io) override {
    io.value("quantile.past", past_);
    io.values("quantile.routed_under", routed_under_);
  }

 private:
  double quantile(const LayerView& layer, std::size_t expert) {
    const double wanted = layer.targets[expert] * static_cast<double>(layer.stats.assignments());
    if (!exact_) return margin_quantile(layer.stats.margins(static_cast<int>(expert)), wanted);
    const std::span<const float> rows = layer.stats.margin_rows();
    column_.resize(rows.size() / experts_);
    for (std::size_t t = 0; t < column_.size(); ++t) column_[t] = rows[t * experts_ + expert];
    // A target share that is not a binary fraction must not lose a token to its rounding.
    const double rank = std::floor(wanted + 1e-6);
    const auto at = std::min(static_cast<std::size_t>(rank), column_.size() - 1);
    std::nth_element(column_.begin(), column_.begin() + static_cast<std::ptrdiff_t>(at), column_.end());
    // The largest move of the histogram; 0 for an expert that should receive no tokens.
    const double most = wanted > 0 ? margin_edge(kMarginBins / 2) : 0;
    return std::min(static_cast<double>(column_[at]), most);
  }

  // The biases that the margins were formed under.
  std::span<const double> routed_under(std::span<const double> bias) const {
    const auto delay = static_cast<std::int64_t>(delay_);
    if (delay == 0 || past_ < delay) return bias;
    return std::span(routed_under_).subspan(static_cast<std::size_t>(past_ % delay) * experts_, experts_);
  }

  // k3: the bias at which each expert has its target load, before the mean is taken out.
  void find_required(const LayerView& layer, std::span<const double> under) {
    const auto [least, most] = std::minmax_element(under.begin(), under.end());
    const double low = *least - 1, range = *most + 1 - low;
    const std::span<const float> rows = layer.stats.margin_rows();
    for (std::size_t i = 0; i < experts_; ++i) {
      std::fill(bins_.begin(), bins_.end(), 0);
      for (std::size_t at = i; at < rows.size(); at += experts_) {
        const double place = std::floor((static_cast<double>(rows[at]) + under[i] - low) / range * kBins);
        ++bins_[static_cast<std::size_t>(std::min(std::max(place, 0.0), kBins - 1.0))];
      }
      const double wanted = layer.targets[i] * static_cast<double>(layer.stats.assignments());
      double before = 0;
      std::size_t bin = 0;
      while (bin + 1 < bins_.size() && before + static_cast<double>(bins_[bin]) < wanted) {
        before += static_cast<double>(bins_[bin++]);
      }
      const auto count = static_cast<double>(bins_[bin]);
      const double part = count > 0 ? std::min((wanted - before) / count, 1.0) : 0;
      required_[i] = low + (static_cast<double>(bin) + part) * (range / kBins);
    }
  }

  // The margins were formed under the biases of `delay` decisions ago. The newest biases take their place in the ring.
  void count_from_then(std::span<const double> bias) {
    const auto delay = static_cast<std::int64_t>(delay_);
    const std::span<double> then =
        std::span(routed_under_).subspan(static_cast<std::size_t>(past_ % delay) * experts_, experts_);
    for (std::size_t i = 0; i < experts_; ++i) {
      if (past_ >= delay) quantiles_[i] += then[i] - bias[i];
      then[i] = bias[i];
    }
    ++past_;
  }

  static constexpr int kBins = 1000;

  bool k3_, exact_;
  double gain_;
  std::size_t experts_, delay_;
  std::int64_t past_ = 0;             // decisions so far
  std::vector<double> routed_under_;  // biases in force at the last `delay` decisions [delay × N], a ring
  std::vector<double> quantiles_;     // [N]
  std::vector<float> column_;         // one expert's margins [T]
  std::vector<std::int64_t> bins_;    // k3: one expert's required biases [kBins]
  std::vector<double> required_;      // k3 [N]
};

}  // namespace

PolicyDescription quantile_bias() {
  const Options defaults;
  PolicyDescription d;
  d.name = "quantile_bias";
  d.summary = "bias from the quantile of each expert's margins at which its load meets its target";
  d.actuators = {Actuator::kExpertBias};
  d.options = {
      {.name = "form",
       .default_value = defaults.form,
       .unit = "",
       .description =
           "histogram: counts that sum over ranks; exact: every token's margin, in one process; k3: "
           "Kimi K3's, in one process",
       .choices = {"histogram", "exact", "k3"}},
      {.name = "gain",
       .default_value = defaults.gain,
       .unit = "",
       .description = "part of the distance to the quantile that one decision covers; published: 1",
       .min = 0,
       .max = 2},
  };
  d.make = [](const PolicyContext& context, const PolicyOptions& options) {
    return std::make_unique<QuantileBias>(Options::from(options), context);
  };
  d.check = [](const PolicyContext& context, const PolicyOptions& options) -> std::string {
    if (context.top_k >= context.experts) return "form: needs top_k below the number of experts";
    const Options o = Options::from(options);
    if (o.form != "k3") return "";
    if (context.score_space == ScoreSpace::kLogit) {
      return "form: k3: bins scores within [0, 1], and logits are not (model.score_space: probability, or "
             "form: "
             "histogram)";
    }
    return o.gain == 1 ? "" : "gain: must be 1 with form: k3, which replaces the bias";
  };
  return d;
}

}  // namespace moectl::policies
