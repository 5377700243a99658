// adaptive_bias: a Kalman filter on the bias that each expert needs.
//
// The idea. For each expert there is a bias b*_i that gives it its target load. It changes over time, because the router
// learns and the data change, and a batch shows it only through noise. The layer measures two things: the slope s_i, the
// relative rise of expert i's load per unit of its bias, and the floor, the standard deviation that a relative load has
// by sampling alone. The filter combines what a batch says about b*_i with the estimate before it, each weighted by its
// variance. The estimate m_i is the bias that is applied.
//
//   symbol     meaning                                                                   unit
//   N, d       experts; decisions by which the routing is late, declared and found       -, decisions
//   c̄_i, c_i   target and load of expert i in this window                                tokens
//   e_i, z_i   error, and the part of it that was not expected                           relative load
//   P_i        variance of s_i (b*_i - m_i): what the estimate is off, as a load         relative load²
//   R          variance of e_i by chance: the floor squared, times a measured n ≥ 1      relative load²
//   b_i(t-d)   the bias that routed this window, without feed-forward                    score units
//   v_i        drift: how far b*_i moves on its own in a decision                        score units
//   gap        mean distance of the last chosen and the first rejected score, times k: a
//              bias that moves by it changes a load by about the load's size (slope.h)   score units
//
//   model      e_i = (c̄_i - c_i)/c̄_i = σ_i (b*_i - b_i(t-d)) + noise of variance R.   s_i b*_i: a random walk of variance
//              q R a decision, on top of v_i. σ_i is the true slope, known roughly: its standard deviation is half of s_i (κ = ½).
//
// Biases taken over from a checkpoint may be right. So the first window sets P_i = mean(z²) - R, at least q R: if its errors
// are only noise, the first step is small. One decision, in this order:
//
//   1 under way    w_i = s_i (b_i(t-d) - m_i)      less the moves not seen yet: an error of -w_i is expected. 0 if d = 0
//   2 innovation   z_i = clip(e_i, ±1) + w_i       seen minus expected. e_i = 1: no tokens, -1: twice the target
//   3 tuning       q, R and the drift's share h follow from the correlations of z (below)
//   4 surprise     if z_i² > 16 (P_i + R + κ² w_i²) and the loop does not swing, b*_i jumped: P_i = z_i² - R, v_i = 0
//   5 gain         K_i = P_i / S_i,   S_i = P_i + R + κ² (P_i + w_i²)
//   6 variance     P_i = (1 - K_i) P_i + q R
//   7 drift        v_i += h K_r²/(2 - K_r) z_i / s_i,  K_r the gain at rest if the slope were known: K_r²/(1 - K_r) = q
//   8 estimate     m_i += clip(K_i z_i / s_i + v_i, ± one gap),   then m -= mean(m), v -= mean(v)
//
// S is the variance of z and P its covariance with what is sought, so K = P/S is the best linear weight. A wrong slope makes
// two errors, and S holds both: in what z shows of the estimate's own error (κ² P), and in what is expected of the moves
// under way (κ² w²). So K ≤ 1/(1 + κ²) = 0.8: the first step, if errors are far above the noise, goes four fifths of the
// way, at most one gap; and the farther the moves under way go, the smaller the gain. At rest P settles (K P = q R), and the
// gain is a matter of q alone (0.05: 0.2, 1e-4: 0.01); R decides how far the filter goes at first, and what is a surprise:
// four standard deviations, by chance one expert in 16 000. While the true slope is less than twice s_i, the loop is stable.
//
// Tuning. A filter with the right q has innovations that do not resemble each other. ρ_l is the correlation, over the
// experts, of z now and z of l decisions ago; a_l is its average over time (whiteness.h).
//
//   q        If neighbours are alike, the filter is too slow: q rises. If they alternate, it is too fast: q falls.
//            ln q += 0.2 ρ_1, at most a factor e in five decisions; q is first 0.05, and 1e-4 to 10. The loop swings if the
//            lowest a_l is clear of chance. That a_l then stands for ρ_1: a swing has a longer period. Looked at are the
//            first 4 + 2d lags of 12, and all while mean(z²) is above 4 R: at rest the lowest of twelve would look so by chance.
//   noise    Mixtures vary from batch to batch. That is noise too, but the floor does not include it. n measures it: the
//            average, weight 0.1, of mean(z²)(1 - max(ρ_1, 0))/floor², each at most 4 n: what z has of the last z is no
//            noise, and one odd batch is no proof. At rest that includes P, so R stands 1/(1 - K) too high.
//   drift    Routers sharpen, so b* moves on steadily, and a filter without v stays behind it. K²/(2 - K) is the weight for
//            a steady trend. But when a trend stops, a large v goes on: so h is at most ¼, as at first. Negative
//            correlations over 5 to 12 decisions show that, positive ones that v misses a trend:
//            ln h += 0.4 mean(a_5 … a_12), h at least 0.003. While the loop swings, or a whole layer meets its targets
//            exactly, v fades by 0.9. A cut move leaves v as it was.
//
// Special cases.
//
//   far       An expert with under a tenth of its target, or with twice its target or more, has an error that says only "at
//             least so far". So the clipped e_i and the bound of one gap grow 1.3 times after an error of the same sign, up
//             to 4 times while that lasts and the loop does not swing. Wrong biases at the start then settle in half of the
//             steps.
//   lateness  Up to four decisions beyond the declared delay are found (lateness.h), if the moves are clear of the noise.
//   rescue    (`rescue: true`) An expert with under a tenth of its target for two steps goes half of what its margins say
//             (margins.h), whatever the gap: the whole way overshoots, because other experts move too.
//   limits    Where limits cut a move, m becomes what was applied. Innovations stay alike then: only a swing tunes q, h
//             stays, and v does not learn.
//
// Form. `gap` needs the k+1 largest scores of each token. `counts` does without and settles later: whiteness tunes a move u,
// which stands for the gap, and the slopes (slope.h); these are too rough to predict with: w_i = 0, and with a delay its q
// and u are tuned 1 + d times as slowly. Feed-forward (`feedforward: tags`, feedforward.h) is the filter's known input: it
// is not part of b_i(t-d), and what it knows to leave over is not part of e_i.
//
// Sources: Kalman, "A new approach to linear filtering and prediction problems", 1960; whiteness: Mehra, "On the
// identification of variances and adaptive Kalman filtering", 1970; K²/(2 - K): Benedict and Bordner, "Synthesis of an
// optimal set of radar track-while-scan smoothing equations", 1962; moves under way: Smith, "Closer control of loops with
// dead time", 1957.
//
// Limitations
// - Lumpy routing (a dozen clusters of nearly identical tokens) moves whole clusters at once; no slope describes it.
// - With a delay, a steady trend is met d decisions late: an error of s d v stays. Two experts that take tokens from each
//   other answer at up to twice their slopes and may swing. Counts only do not settle with a softmax four decisions late,
//   any router eight late, or a lateness of two that is not declared.
// - One R serves all experts: one with a small target is surprised more often.
#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/lanes.h"
#include "policies/biases.h"
#include "policies/builtin.h"
#include "policies/choice.h"
#include "policies/feedforward.h"
#include "policies/lateness.h"
#include "policies/load_error.h"
#include "policies/slope.h"
#include "policies/whiteness.h"

namespace moectl::policies {
namespace {

// The essay gives the reason for each of these.
constexpr double kDoubtSq = 0.25, kSurpriseSq = 16;
constexpr double kFirstQ = 0.05, kLeastQ = 1e-4, kMostQ = 10, kWhitening = 0.2;
constexpr double kMostDrift = 0.25, kLeastDrift = 0.003, kDriftWhitening = 0.4, kDriftKept = 0.9;
constexpr double kLoudSq = 4, kNoiseEma = 0.1, kNoiseStep = 4;
constexpr double kFarGrowth = 1.3, kFarMost = 4;
constexpr double kRescue = 0.5, kLeastNoise = 1e-8, kLeastError = 1e-5;

class AdaptiveBias final : public Policy {
 public:
  AdaptiveBias(const PolicyOptions& options, const PolicyContext& context)
      : form_(options.text("form")),
        rescue_(options.flag("rescue")),
        n_(static_cast<std::size_t>(context.experts)),
        // In decisions: a window of several steps was routed by the biases of most of them.
        delay_(static_cast<std::size_t>((context.delay + context.cadence / 2) / context.cadence)),
        slope_(form_, context.score_space == ScoreSpace::kLogit, n_),
        past_biases_((delay_ + Lateness::kMost + 2) * n_),
        errors_(2 * n_),
        white_(n_) {
    for (auto* of_experts : {&estimate_, &drift_, &proposed_}) of_experts->resize(n_);
    for (auto* of_experts : {&variance_, &farther_}) of_experts->resize(n_, 1.0);
    if (options.text("feedforward") == "tags") feedforward_.emplace(context.domains, n_);
  }

  StatsNeeds needs() const override { return {.gap = form_ != "counts", .margins = rescue_}; }
  StatsNeeds required() const override { return {.gap = form_ == "gap" || feedforward_, .margins = rescue_}; }

  void propose(const LayerView& layer, std::span<double> bias) override {
    if (!slope_.follow(layer.stats)) return;
    remember(layer.probe, bias);
    measure_errors(layer);
    const double floor = floor_of(layer.metrics).cv.value_or(0);
    const double floor_sq = std::max(floor * floor, kLeastNoise);
    if (decisions() > 0)
      lateness_.observe(errors(0), errors(1), slope_.values(), floor_sq * noise_, kDoubtSq,
                        [&](std::size_t late) { return past(delay_ + late); });
    innovate(floor_sq);
    update(floor_sq * noise_);
    if (rescue_ && layer.stats.has_margins()) rescue(layer);
    centre(estimate_);
    std::copy(estimate_.begin(), estimate_.end(), bias.begin());
    white_.next();
    if (feedforward_) {
      feedforward_->learn(layer.stats, layer.targets);
      feedforward_->plan(layer.info.next_mixture, slope_.values(), bias);
    }
    std::copy(bias.begin(), bias.end(), proposed_.begin());
    planned_ = true;
  }

  void on_applied(std::span<const double> applied, const LimitReport& why) override {
    if (!std::exchange(planned_, false)) return;
    limited_ = differ(applied, proposed_);
    // Nothing goes farther while it is asked whether the load answers at all, or where it was not done.
    if (why.held() || why.has(Reason::kProbe)) std::fill(farther_.begin(), farther_.end(), 1.0);
    if (feedforward_ && !why.held()) feedforward_->commit(applied, limited_);
    if (!limited_) return;
    for (std::size_t i = 0; i < n_; ++i)
      estimate_[i] = applied[i] - (feedforward_ ? feedforward_->in_force()[i] : 0);
    centre(estimate_);
  }

  void leave_for_deployment(std::span<double> bias) const override {
    for (std::size_t i = 0; feedforward_ && i < n_; ++i) bias[i] -= feedforward_->in_force()[i];
  }

  void exchange(StateIo& io) override {
    io.value("adaptive.limited", limited_);
    io.value("adaptive.q", q_, {kLeastQ, kMostQ});
    io.value("adaptive.drift_share", drift_share_, {kLeastDrift, kMostDrift});
    io.value("adaptive.noise", noise_, {1, StateIo::kNotNegative.most});
    io.values("adaptive.past_biases", past_biases_);
    io.values("adaptive.estimate", estimate_);
    io.values("adaptive.variance", variance_, StateIo::kNotNegative);
    io.values("adaptive.drift", drift_);
    io.values("adaptive.farther", farther_, {1, kFarMost});
    io.values("adaptive.errors", errors_, {-1, 1});
    white_.exchange(io);
    slope_.exchange(io);
    lateness_.exchange(io);
    if (feedforward_) feedforward_->exchange(io);
  }

 private:
  // The row of a ring, `back` decisions ago.
  std::span<double> row(std::vector<double>& ring, std::size_t back) const {
    const std::size_t rows = ring.size() / n_;
    return std::span(ring).subspan((static_cast<std::size_t>(decisions()) + rows - back) % rows * n_, n_);
  }
  std::span<double> past(std::size_t back) { return row(past_biases_, back); }
  std::span<double> errors(std::size_t back) { return row(errors_, back); }
  std::int64_t decisions() const { return white_.decisions(); }
  std::size_t delay() const { return delay_ + lateness_.steps(); }

  // The bias that routed this window or, with a delay, a later one. Without what feed-forward added for the data's sake.
  void remember(std::span<const double> probe, std::span<const double> bias) {
    const std::span<double> now = past(0);
    std::copy(bias.begin(), bias.end(), now.begin());
    for (std::size_t i = 0; i < probe.size(); ++i) now[i] += probe[i];
    for (std::size_t i = 0; feedforward_ && i < n_; ++i) now[i] -= feedforward_->in_force()[i];
    centre(now);
    if (decisions() > 0) return;
    std::copy(now.begin(), now.end(), estimate_.begin());
    for (std::size_t at = n_; at < past_biases_.size(); ++at) past_biases_[at] = past_biases_[at - n_];
  }

  void measure_errors(const LayerView& layer) {
    const auto total = static_cast<double>(layer.stats.assignments());
    const std::span<double> error = errors(0);
    const std::span<const std::int64_t> counts = layer.stats.counts();
    for_each_eight(n_, [&](std::size_t i, auto at) {
      const Double8 wanted = at.get(&layer.targets[i]) * total;
      at.put(&error[i], relative_error(wanted, wanted - at.get(&counts[i])));
    });
    for (std::size_t i = 0; feedforward_ && i < n_; ++i) error[i] -= feedforward_->left_over(i);
    for_each_eight(n_,
                   [&](std::size_t i, auto at) { at.put(&error[i], within(at.get(&error[i]), splat(1))); });
  }

  // Innovations, their correlation with earlier ones, and what follows for q, the noise and the drift.
  void innovate(double floor_sq) {
    const bool rough = slope_.from_counts();
    const std::span<const double> then = past(rough ? 0 : delay()), error = errors(0),
                                  slope = slope_.values();
    const std::span<double> newest = white_.newest();
    for_each_eight(n_, [&](std::size_t i, auto at) {
      const Double8 z = at.get(&error[i]) + at.get(&slope[i]) * (at.get(&then[i]) - at.get(&estimate_[i]));
      at.put(&newest[i], within(z, splat(kMostEffect)));
    });
    const double n = static_cast<double>(n_), square = white_.measure();
    const bool loud = square > kLoudSq * n * floor_sq * noise_;
    white_.compare(loud ? Whiteness::kLags : Whiteness::kNear + 2 * delay());
    const double drive = white_.swings() ? white_.lowest() : limited_ ? 0 : white_.nearest();
    const double tuned = kWhitening * drive / static_cast<double>(rough ? 1 + delay() : 1);
    q_ = std::clamp(q_ * std::exp(tuned), kLeastQ, kMostQ);
    drift_share_ *= std::exp(limited_ ? 0 : kDriftWhitening * white_.distant());
    drift_share_ = std::clamp(drift_share_, kLeastDrift, kMostDrift);
    if (rough && decisions() > 0)
      slope_.learn(tuned, white_.newest(), white_.last(), white_.swings() || delay() > 0, limited_);
    const double unlike = decisions() > 0 ? 1 - std::max(white_.nearest(), 0.0) : 0;
    noise_ += kNoiseEma * (std::min(square / n / floor_sq, kNoiseStep * noise_) * unlike - noise_);
    noise_ = std::max(noise_, 1.0);
    // What swings is no trend; and targets that are met exactly would never end one.
    if (white_.swings() || square < kLeastError * kLeastError * n)
      for (double& v : drift_) v *= kDriftKept;
  }

  void update(double noise) {
    const double at_rest = (std::sqrt(q_ * q_ + 4 * q_) - q_) / 2;  // the K whose P reproduces itself
    const double learning = limited_ ? 0 : drift_share_ * at_rest * at_rest / (2 - at_rest);
    const std::span<const double> z = white_.newest(), error = errors(0), last = errors(1);
    const std::span<const double> slope = slope_.values();
    if (decisions() == 0)
      std::fill(variance_.begin(), variance_.end(),
                std::max(dot(z, z) / static_cast<double>(n_) - noise, q_ * noise));
    const Double8 steady = splat(white_.swings() ? 0 : 1), one = splat(1), zero = splat(0);
    for_each_eight(n_, [&](std::size_t i, auto at) {
      const Double8 e = at.get(&error[i]), seen = at.get(&z[i]), under_way = seen - e, square = seen * seen;
      const Double8 unsure = noise + kDoubtSq * under_way * under_way, before = at.get(&variance_[i]);
      const Double8 surprised = steady * less(kSurpriseSq * (before + unsure), square);
      const Double8 variance = select(surprised, square - noise, before);
      const Double8 gain = variance / ((1 + kDoubtSq) * variance + unsure);
      at.put(&variance_[i], (1 - gain) * variance + q_ * noise);
      const Double8 stays_far = steady * is_far(e) * less(zero, e * at.get(&last[i]));
      const Double8 farther =
          select(stays_far, smaller(at.get(&farther_[i]) * kFarGrowth, splat(kFarMost)), one);
      at.put(&farther_[i], farther);
      const Double8 per_slope = 1 / at.get(&slope[i]), old = at.get(&drift_[i]);
      const Double8 drift = select(surprised, zero, old + learning * seen * per_slope);
      const Double8 move = gain * (farther * e + under_way) * per_slope + drift;
      const Double8 made = within(move, farther * slope_.unit());
      at.put(&estimate_[i], at.get(&estimate_[i]) + made);
      // No windup of what the bound cut.
      at.put(&drift_[i], select(surprised + equal(made, move), drift, old));
    });
    centre(drift_);
  }

  void rescue(const LayerView& layer) {
    const auto total = static_cast<double>(layer.stats.assignments());
    for (std::size_t i = 0; i < n_; ++i) {
      if (errors(0)[i] <= kFarBelow || farther_[i] < kFarGrowth * kFarGrowth) continue;
      const double wanted = layer.targets[i] * total;
      estimate_[i] = past(0)[i] + kRescue * margin_quantile(layer.stats.margins(static_cast<int>(i)), wanted);
      drift_[i] = 0;
    }
  }

  std::string form_;
  bool rescue_;
  std::size_t n_, delay_;
  Slope slope_;
  Lateness lateness_;
  std::optional<Feedforward> feedforward_;
  bool limited_ = false;
  bool planned_ = false;                                       // the last propose() went through to its end
  double q_ = kFirstQ, noise_ = 1, drift_share_ = kMostDrift;  // q, n in floors squared, h
  std::vector<double> past_biases_, errors_;                   // own biases in force and e, rings [rows × N]
  std::vector<double> estimate_, variance_, drift_, farther_, proposed_;  // m, P, v, growth of far steps [N]
  Whiteness white_;
};

std::string check(const PolicyContext& context, const PolicyOptions& options) {
  const std::string& form = options.text("form");
  const bool tags = options.text("feedforward") == "tags", rescue = options.flag("rescue"),
             all = context.top_k >= context.experts;
  if (form == "gap" && all) return "form: gap: needs top_k below the number of experts";
  if (tags && context.domains < 2) return "feedforward: tags: needs at least two domains in model.domains";
  if (tags && form == "counts") return "feedforward: tags: needs the gap";
  const std::string needs = tags ? "feedforward: tags: needs " : "rescue: true: needs ";
  if ((tags || rescue) && context.delay > 0)
    return needs + "routing that is not late (model.delay: 0, lag: 0)";
  if (tags && context.cadence > 1)
    return needs + "a decision for every batch, since each has a mixture of its own (limits.cadence: 1)";
  return rescue && all ? "rescue: true: needs top_k below the number of experts" : "";
}

}  // namespace

PolicyDescription adaptive_bias() {
  PolicyDescription d;
  d.name = "adaptive_bias";
  d.summary = "a Kalman filter on the bias that each expert needs, by the measured slope of its load";
  d.actuators = {Actuator::kExpertBias};
  d.options = {
      choice("form", "auto",
             "source of the slope: the score gap, or counts only; auto = the gap if the router gives it",
             {"auto", "gap", "counts"}),
      choice("feedforward", "off",
             "tags: cancel ahead what the next batch's domain mixture will do to the loads", {"off", "tags"}),
      {"rescue", false, "", "bring starved experts back by their margins; wants all of the router's scores"},
  };
  d.make = [](const PolicyContext& context, const PolicyOptions& options) {
    return std::make_unique<AdaptiveBias>(options, context);
  };
  d.check = check;
  return d;
}

}  // namespace moectl::policies
