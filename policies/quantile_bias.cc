// quantile_bias: moves every bias towards the value at which its expert would have had its target load in the last
// window.
//
//   d_ti = θ_t - v_ti         margin: how much the bias of i must rise for token t to choose i; v biased scores
//   q_i  = Q(d_·i, w_i kT)    the move at which w_i kT tokens have a negative margin, w_i the target share
//   b_i ← b_i + gain · q_i,   b -= mean(b)
//
//   histogram:   θ_t = (v_k + v_(k+1))/2; Q by counts in bins, linear within one (margins.h)
//   k3:          b_i ← the w_i kT-th smallest of r_ti = v_(k+1) - s_ti, s the scores without biases; mean out
//   local_mean:  b_i ← b_i + gain · (q_i - b_i), q_i the mean over micro-batches of the (⌊kT/N⌋ + 1)-th smallest of r_ti
//                in one; mean out
//
// There is no step size, because the layer's own scores give the distance to go. If the other biases and the thresholds
// did not change, one full step would balance the batch that it came from. But all biases move at once (a Jacobi
// iteration on the dual of the assignment problem), and the next batch has other tokens, so a full step adds the
// sampling noise of one batch to the next. `gain` is the part of the distance that one decision covers, which makes b
// an exponential average over batches. At 0.3 it adds g/(2 - g), a sixth, of the variance that full steps add.
//
// With a delay, the margins belong to the biases of earlier decisions, and q is counted from those:
//   b_i ← b_i + gain · (b_i then + q_i - b_i)
// The aim, b_i then + q_i, does not depend on the bias in force, so late margins do not make the loop oscillate. r_ti is
// such an aim by itself: it is formed with the biases that the token was routed under.
//
// `k3` is the published form to the bit, for a run that must match one of Kimi K3: r is counted in 1000 equal bins over
// [min b - 1, max b + 1], the bin ⌊1000 (r - low)/(high - low)⌋ and never beyond the outer ones; the first bin at which
// the sum over all ranks reaches w_i kT (not rounded) is taken, linear within it; the bias is replaced, at every step. b
// are the biases of the batch's own step, the same on every rank, so the bins are; with `lag: 1` they are those of the
// step whose sums are being reduced. Scores must lie within [0, 1], or the bins miss them. Two counts share a word of the
// payload: 500 words an expert, 59 MB for 58 layers × 256 experts. They are exact up to 2^29 tokens a step
// (kMostRequiredTokens); beyond, the biases are held.
//
// `local_mean` is Megatron-Core's: each micro-batch, a call of record(), has a quantile of its own, the order statistic
// itself; the mean over micro-batches and ranks is what the bias goes to. The published EMA is 1 - gain, by default 0.
// A micro-batch has few tokens, so the mean of its quantiles is another value than the quantile of the batch where the
// tails of r differ. It takes any scores (Megatron's are logits) and N integers a layer. It works to equal targets.
// Megatron averages the means of its ranks; the same where all ranks have as many micro-batches.
//
// Sources: Su, kexue.fm 11619, and openathena.ai/blog/quantile-balancing (the quantile of a batch, an EMA of 0 to .9); the
// Kimi K3 technical report, section 2.3.3 and appendix D, details as in torchtitan's QuantileBalancer, pull request 4577
// (`k3`); Megatron-LM, pull request 5349 (`local_mean`: qb_dual_update, _update_router_qb_beta; its β is -b).
//
// Limitations
// - It needs all scores of the router, not only the largest k+1. `k3` and `local_mean` are counted on the host: scores on an
//   accelerator are copied.
// - If many tokens have nearly the same margin, the quantile lies at the edge of such a cluster and jumps across it.
// - Where all scores are equal, as in a router that begins at zero, so are the quantiles: biases move once scores differ.
// - With k = N there are no margins, and biases do not move.
#include <cstdint>
#include <vector>

#include "base/lanes.h"
#include "policies/builtin.h"
#include "policies/choice.h"

namespace moectl::policies {
namespace {

enum class Form { kHistogram, kK3, kLocalMean };

struct Options {
  std::string form = "histogram";
  double gain = 0.3;

  static Options from(const PolicyOptions& o) { return {.form = o.text("form"), .gain = o.number("gain")}; }
};

Form form_of(const std::string& name) {
  return name == "k3" ? Form::kK3 : name == "local_mean" ? Form::kLocalMean : Form::kHistogram;
}

class QuantileBias final : public Policy {
 public:
  QuantileBias(const Options& options, const PolicyContext& context)
      : form_(form_of(options.form)),
        gain_(options.gain),
        experts_(static_cast<std::size_t>(context.experts)),
        delay_(form_ == Form::kHistogram ? static_cast<std::size_t>(context.delay) : 0),
        routed_under_(delay_ * experts_, 0.0),
        quantiles_(form_ == Form::kHistogram ? experts_ : 0, 0.0) {}

  StatsNeeds needs() const override {
    return {.margins = form_ == Form::kHistogram,
            .required_bins = form_ == Form::kK3,
            .required_local = form_ == Form::kLocalMean};
  }

  void propose(const LayerView& layer, std::span<double> bias) override {
    const bool known = form_ == Form::kHistogram ? move_by_margins(layer, bias)
                       : form_ == Form::kK3      ? replace(layer, bias)
                                                 : follow_micro_batches(layer.stats, bias);
    if (!known) return;
    const double mean = sum_of(bias) / static_cast<double>(experts_);
    for (double& b : bias) b -= mean;
  }

  void exchange(StateIo& io) override {
    io.value("quantile.decisions", decisions_);
    io.values("quantile.routed_under", routed_under_);
  }

 private:
  // Each returns whether the scores came, and then writes the biases before their mean is taken out.
  bool move_by_margins(const LayerView& layer, std::span<double> bias) {
    const bool known = layer.stats.has_margins();
    for (std::size_t i = 0; i < experts_; ++i) {
      quantiles_[i] = known ? margin_quantile(layer.stats.margins(static_cast<int>(i)), wanted(layer, i)) : 0;
    }
    if (delay_ > 0) count_from_then(bias);
    if (!known) return false;
    for (std::size_t i = 0; i < experts_; ++i) bias[i] += gain_ * quantiles_[i];
    return true;
  }

  bool replace(const LayerView& layer, std::span<double> bias) {
    const RoutingStats& stats = layer.stats;
    if (!stats.has_required_bins()) return false;
    for (std::size_t i = 0; i < experts_; ++i) {
      bias[i] =
          required_bias(stats.required_range(), stats.required_bins(static_cast<int>(i)), wanted(layer, i));
    }
    return true;
  }

  bool follow_micro_batches(const RoutingStats& stats, std::span<double> bias) {
    if (!stats.has_required_local()) return false;
    for (std::size_t i = 0; i < experts_; ++i) {
      bias[i] += gain_ * (stats.required_local(static_cast<int>(i)) - bias[i]);
    }
    return true;
  }

  double wanted(const LayerView& layer, std::size_t expert) const {
    return layer.targets[expert] * static_cast<double>(layer.stats.assignments());
  }

  // The margins were formed under the biases of `delay` decisions ago. The newest biases take their place in the ring.
  void count_from_then(std::span<const double> bias) {
    const auto delay = static_cast<std::int64_t>(delay_);
    const std::span<double> then =
        std::span(routed_under_).subspan(static_cast<std::size_t>(decisions_ % delay) * experts_, experts_);
    for (std::size_t i = 0; i < experts_; ++i) {
      if (decisions_ >= delay) quantiles_[i] += then[i] - bias[i];
      then[i] = bias[i];
    }
    ++decisions_;
  }

  Form form_;
  double gain_;
  std::size_t experts_, delay_;
  std::int64_t decisions_ = 0;
  // Of the histogram: biases in force at the last `delay` decisions [delay × N], a ring; and quantiles [N].
  std::vector<double> routed_under_, quantiles_;
};

}  // namespace

PolicyDescription quantile_bias() {
  const Options defaults;
  PolicyDescription d;
  d.name = "quantile_bias";
  d.summary = "bias from the quantile of each expert's margins at which its load meets its target";
  d.actuators = {Actuator::kExpertBias};
  d.options = {
      choice("form", defaults.form,
             "histogram: of margins, in bins that fit any scale; "
             "k3: Kimi K3's, of the whole batch; local_mean: Megatron-Core's, by micro-batch",
             {"histogram", "k3", "local_mean"}),
      {"gain", defaults.gain, "",
       "part of the distance to the quantile that one decision covers; 1 - EMA; published: 1", 0, 2},
  };
  d.make = [](const PolicyContext& context, const PolicyOptions& options) {
    return std::make_unique<QuantileBias>(Options::from(options), context);
  };
  d.check = [](const PolicyContext& context, const PolicyOptions& options) -> std::string {
    if (context.top_k >= context.experts) return "form: needs top_k below the number of experts";
    const Options o = Options::from(options);
    if (o.form != "k3") return "";
    if (context.score_space == ScoreSpace::kLogit) {
      return "form: k3: bins scores within [0, 1], and logits are not "
             "(model.score_space: probability, or form: histogram)";
    }
    if (context.cadence > 1)
      return "form: k3: needs limits.cadence: 1: its bins follow the biases of one step";
    return o.gain == 1 ? "" : "gain: must be 1 with form: k3, which replaces the bias";
  };
  return d;
}

}  // namespace moectl::policies
