// adaptive_bias: integral control of the biases. The step is measured in score gaps, and the gain tunes itself.
//
// The idea. An expert with too few tokens gets a larger bias, in proportion to its relative error e_i. Two questions
// decide how fast that converges: what is the unit of the step, and how large is the gain? The unit is the mean gap Ḡ
// between the k-th and the (k+1)-th score, because it tells how many tokens a move of the bias redirects. The gain g
// follows the correlation between successive errors: if they have the same sign the loop is too slow and g rises, if
// they alternate the loop overshoots and g falls. Three refinements follow: a share h_i of the gain for each expert, a
// larger gain F for errors far above the noise, and a trend t_i for biases that must move steadily.
//
//   e_i = (c̄_i - c_i) / c̄_i                            c̄_i target load, S/N unless targets are configured
//   Ḡ  += gap_ema · (G - Ḡ),  G = k · mean_t(v_k - v_{k+1})     v sorted biased scores; counts only: Ḡ ≡ 1
//   r_l = ⟨e_t, e_{t-l}⟩ / (|e_t| |e_{t-l}|),   a_l += correlation_ema · (r_l - a_l)
//                                        D = d+1; l = D, then each 1 + ⌊(l-D)/4⌋ farther, up to 3D+9
//   drive = min_l a_l  if that is below -0.8/√(N-1),  else r_D
//   g   = clip(g · exp(adaptation/D · drive), g_min, g_max)
//   ρ_i(l) += (0.1/D) · (2 e_ti e_{t-l,i} / (e_ti² + e_{t-l,i}²) - ρ_i(l))        e clipped to ±1
//   h_i = h_i · exp(0.3/D · ρ_i(2D-1))  if ρ_i(2D-1) < -0.4/√D
//         h_i · exp(0.1/D · ρ_i(D))     if ρ_i(D) > 0.4/√D and min_l a_l is not significant, else as it was
//   h_i = clip(h_i / (geometric mean of h), 1/16, 8)
//   n²   = max(floor², n² + 0.1 · (min(rms² e, 4n²) · (1 - max(r_D, 0)) - n²))
//                                                          floor: the CV that perfect balance would show;
//                                                          n = floor until there is an r_D
//   s(e) = x⁴ / (1 + x⁴),  x = e / 4n
//   F    = max(g, clip(F · exp(adaptation/D · s(rms e) · drive), g_min, g_max)),  first 2g
//   λ_i += 0.3 · (s(e_i) · max(0, 2 e_ti e_{t-D,i} / (e_ti² + e_{t-D,i}²)) - λ_i)
//   g_i  = g + (F - g) · λ_i
//   t_i  = t_i · max(0, 1 + min_l a_l + 0.8/√(N-1))      the factor only if min_l a_l is significant, as above;
//                                                          at most 15/16 if all e_i are 0
//          + g/(16 D F) · g · h_i · Ḡ · (1 - s(e_i)) · e_i
//   b_i += g_i · h_i · Ḡ · clip(e_i, -1, 1) + t_i,   b -= mean(b)
//
// The reasons for each part:
//
// The gap is the unit. How many tokens change expert when a bias moves by δ is the density of tokens at the
// selection threshold times δ, and the gap between the k-th and the (k+1)-th score is the inverse of that
// density. Measured in gaps, the gain at which an integrator becomes unstable is nearly the same for softmax,
// sigmoid and raw scores, sharp or flat; measured in scores it spreads over more than an order of magnitude.
// Multiply all scores by a hundred and the gap, and with it the step, follows.
//
// The best integrator whitens its error. At the gain of least variance successive errors are uncorrelated
// (the minimum-variance controller of Åström, "Introduction to Stochastic Control Theory", 1970, ch. 6).
// Positive correlation between neighbouring errors says that the loop is too slow; negative correlation at
// any lag says that it overshoots. So each layer finds its own gain while it runs, without a model of the
// router. N errors give a correlation a standard error of about 1/√(N-1), which is where the threshold comes
// from: only a correlation that chance does not explain may overrule the nearest lag.
//
// Experts differ. With a softmax gate the scores of a seldom chosen expert lie close together at the
// threshold and those of a popular one far apart, so that under one common gain the first flips between too
// many and too few tokens at every step while the second creeps. Each expert's own correlation shows it, once
// it is averaged over some ten steps and clear of chance (0.4 is two and a half standard errors), and moves
// the expert's share h_i of the gain; what all experts have in common stays with g. Each pair of errors counts
// the same, so that one large disturbance does not pass for a trend. While all of them swing, neighbouring
// errors are alike within each half period and prove no one slow. `per_expert: false` leaves h_i at 1.
//
// Errors far above the noise are real and get a larger gain. The gain that whitens is small where noise is most of what
// is seen, and too small when the data change and errors are twenty floors high. So an error of more than four times
// the noise is met with a gain of its own, F, which is learnt in such times alone; as a Kalman filter's gain is the
// larger the more of an error is not noise. Only as far as the expert's error has been far, on one side, for some steps
// (λ): one that overshoots gets no more of it. F begins at half a gap, which is half to a third of what makes a loop
// unstable, and may come to be twenty times g; and what chance throws far out for a step or two needs none of it: the
// seldom chosen experts of a softmax lie so close together that a step under F takes one of them past all the others
// and gives it the tokens of ten. The noise is the floor where tokens are all that varies (metrics.h). Mixtures that
// vary from batch to batch come on top and no floor knows of them: so it is the level of the errors that are unlike the
// last ones.
//
// Errors that stay on one side near the floor are a trend. Routers sharpen and preferences form, most of it in the
// first hundreds of steps, so the biases that are wanted move steadily, and a plain integrator trails them by
// drift over gain: with many tokens that is more than the noise. t learns the drift from what the step leaves
// over. An integrator that goes the share α of the way, with a trend that learns β of it, is critically damped
// at β/α = α/4; F being about half a full step, g/16F is half of that. Errors far from the noise teach it
// nothing, since they are being dealt with; and what swings is no trend, so a negative correlation sheds it.
//
// With a declared delay of d steps an error answers to the bias of D = d+1 steps ago, so nearer lags say
// nothing about the gain. The first gain and its bounds are divided by D, and so are the rates of all gains,
// which would else have grown by a half before the first answer to them is seen. The lags reach past three
// times D, and so past the half period 2D - 1 of the slowest oscillation that the delay can cause; by the
// correlation at that half period an expert's own gain falls. Without a delay they reach to 12, which is the
// half period of one that is five steps late and was not declared.
//
// What the limits do to a proposal comes back through on_applied: after a hold, a rate limit or a clip the
// errors stay alike for a reason that is not the gain, so the gain may then fall but not rise. The bias
// itself cannot wind up, because every step starts from what is in force.
//
// Form. `gap` needs the k+1 largest scores from the router; `counts` does without and starts from a gain that
// fits common routers (1e-3 on probabilities, 1e-2 on logits), trusting the correlation to find the rest
// within wide bounds; `auto` takes the gap if the first window has one.
//
// Feed-forward (`feedforward: tags`) cancels ahead what the next batch's mixture will do: feedforward.h.
//
// Rescue (`rescue: true`). A bias moves by at most one gap a step, so an expert that sinks by many gaps at
// once takes long to come back. Where the router hands out all its scores, the layer's margins (margins.h) say
// how far it has to go: an expert with e_i > 0.75 for three steps goes half of that way at each step instead,
//
//   b_i += 0.5 (τ_i - b_i),   τ_i - b_i = the move at which c̄_i tokens of this batch would have chosen i
//
// until it has a quarter of its load.
//
// Limitations
// - An undeclared delay of more than two or three steps makes it swing; declare it (`model.delay`).
// - Lumpy routing (a dozen clusters of nearly identical tokens) moves whole clusters at once; no integral control
//   on the counts alone is smooth there.
// - It balances every window as it comes. Errors that come from the data's order rather than from the router,
//   such as alternating domains, are seen only once they have happened.
#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "base/lanes.h"
#include "policies/builtin.h"
#include "policies/feedforward.h"

namespace moectl::policies {
namespace {

struct Options {
  std::string form = "auto";
  double gain = 0;
  double gain_min = 0;
  double gain_max = 0;
  double adaptation = 0.1;
  double correlation_ema = 0.2;
  double gap_ema = 0.1;
  bool per_expert = true;
  std::string feedforward = "off";
  double feedforward_share = 0.8;
  bool rescue = false;

  static Options from(const PolicyOptions& o) {
    return {.form = o.text("form"),
            .gain = o.number("gain"),
            .gain_min = o.number("gain_min"),
            .gain_max = o.number("gain_max"),
            .adaptation = o.number("adaptation"),
            .correlation_ema = o.number("correlation_ema"),
            .gap_ema = o.number("gap_ema"),
            .per_expert = o.flag("per_expert"),
            .feedforward = o.text("feedforward"),
            .feedforward_share = o.number("feedforward_share"),
            .rescue = o.flag("rescue")};
  }
};

// Gains are in gaps (gap form) or in score units (counts only), before division by D.
struct Gains {
  double first, min, max;
};
constexpr Gains kGapGains{0.25, 0.001, 1.0};
constexpr Gains kCountsGains{1e-3, 1e-6, 1.0};
constexpr Gains kCountsLogitGains{1e-2, 1e-6, 1.0};

// Correlations of less than this number of standard errors are chance.
constexpr double kSignificance = 0.8;

// Each expert's own share of the gain. The rates are divided by D, the threshold by √D. The share falls faster than it
// rises, because an expert that oscillates does more harm than one that is slow.
constexpr double kShareEma = 0.1;
constexpr double kShareSignificance = 0.4;
constexpr double kShareRise = 0.1, kShareFall = 0.3;
constexpr double kShareMin = 1.0 / 16, kShareMax = 8;

// Errors above kFar × noise count as signal. kFarFirst: their first gain, in first gains. kPersistenceEma: weight of
// the newest window in far_persistence_. kTrendRate: how fast the trend follows smaller errors.
constexpr double kFar = 4;
constexpr double kFarFirst = 2;
constexpr double kPersistenceEma = 0.3;
constexpr double kTrendRate = 1.0 / 16;
// If targets are met exactly (k experts should receive all tokens), every error is 0, so trends must decay by
// themselves. An RMS error below this is a rounding of the targets.
constexpr double kNegligibleError = 1e-5;

// Weight of the newest window in the measured noise, and the largest multiple of the noise that one window may
// contribute.
constexpr double kNoiseEma = 0.1, kNoiseStep = 4;

double clip_error(double e) {
  return std::min(std::max(e, -1.0), 1.0);
}

// The weight, from 0 to 1, with which an error of x · kFar · noise counts as signal.
double signal_weight(double x) {
  const double square = x * x;
  return 1 - 1 / (1 + square * square);
}

// Similarity of two errors: 1 if equal, -1 if opposite, whatever their size; 0 on average for noise. It has no branch,
// so that loops over it vectorise.
double similarity(double a, double b) {
  a = clip_error(a);
  b = clip_error(b);
  const double square = a * a + b * b;
  return 2 * a * b / (square > 0 ? square : 1.0);
}

// Rescue: the error of a starving expert, the number of steps before the rescue starts, and the part of the distance to
// go at each step.
constexpr double kStarving = 0.75;
constexpr std::int64_t kStarvedFor = 3;
constexpr double kRescue = 0.5;

class AdaptiveBias final : public Policy {
 public:
  AdaptiveBias(const Options& options, const PolicyContext& context)
      : options_(options),
        score_space_(context.score_space),
        first_lag_(static_cast<std::size_t>(context.delay) + 1),
        lags_(lags_from(first_lag_)),
        experts_(static_cast<std::size_t>(context.experts)),
        errors_(experts_, 0.0),
        starving_(options.rescue ? experts_ : 0, 0),
        history_(lags_.back() * experts_, 0.0),
        norms_(lags_.back(), 0.0),
        correlations_(lags_.size(), 0.0),
        lag_similarity_(experts_, 0.0),
        far_persistence_(experts_, 0.0),
        gain_shares_(experts_, 1.0),
        near_similarity_(options.per_expert ? experts_ : 0, 0.0),
        half_period_similarity_(first_lag_ > 1 ? near_similarity_.size() : 0, 0.0),
        trends_(experts_, 0.0) {
    if (options_.form != "auto") choose_form(options_.form == "gap");
    if (options_.feedforward == "tags") feedforward_.emplace(context.domains, experts_);
  }

  StatsNeeds needs() const override { return {.gap = options_.form != "counts", .margins = options_.rescue}; }
  StatsNeeds required() const override {
    return {.gap = options_.form == "gap" || feedforward_, .margins = options_.rescue};
  }

  void propose(const LayerView& layer, std::span<double> bias) override {
    const std::optional<double> gap = measured_gap(layer.stats);
    if (!form_known_) choose_form(gap.has_value());
    if (!follow_gap(gap)) return;
    measure_errors(layer);
    tune_gains(floor_of(layer.metrics).cv);
    const Step step = step_now();
    move(step, bias);
    if (options_.rescue) rescue(layer, step, bias);
    if (feedforward_) {
      feedforward_->learn(layer.stats, layer.targets);
      for (std::size_t i = 0; i < experts_; ++i) bias[i] -= feedforward_->in_force()[i];
    }
    const double mean = sum_of(bias) / static_cast<double>(experts_);
    for (double& b : bias) b -= mean;
    if (feedforward_) {
      feedforward_->plan(layer.info.next_mixture, uses_gap_ ? options_.feedforward_share * gap_ : 0, bias);
    }
    planned_ = true;
  }

  void on_applied(std::span<const double> applied, const LimitReport& why) override {
    limited_ = !why.empty();
    if (feedforward_ && planned_ && !why.held()) {
      if (limited_) {
        feedforward_->commit_cut(applied);
      } else {
        feedforward_->commit();
      }
    }
    planned_ = false;
  }

  void leave_for_deployment(std::span<double> bias) const override {
    if (!feedforward_) return;
    for (std::size_t i = 0; i < experts_; ++i) bias[i] -= feedforward_->in_force()[i];
  }

  void exchange(StateIo& io) override {
    bool form_known = form_known_, uses_gap = uses_gap_;
    io.value("adaptive.form_known", form_known);
    io.value("adaptive.uses_gap", uses_gap);
    if (io.reads() && form_known) choose_form(uses_gap);
    const NumberRange gains = {std::min(gain_min_, gain_max_), std::max(gain_min_, gain_max_)};
    io.value("adaptive.gain", gain_, gains);
    io.value("adaptive.far_gain", far_gain_, gains);
    io.value("adaptive.gap_known", gap_known_);
    io.value("adaptive.gap", gap_, StateIo::kNotNegative);
    io.value("adaptive.limited", limited_);
    io.value("adaptive.noise_sq", noise_sq_, StateIo::kNotNegative);
    io.value("adaptive.past", windows_seen_);
    io.values("adaptive.history", history_);
    io.values("adaptive.norms", norms_, StateIo::kNotNegative);
    io.values("adaptive.correlations", correlations_);
    io.values("adaptive.lasting", far_persistence_);
    io.values("adaptive.shares", gain_shares_, {kShareMin, kShareMax});
    io.values("adaptive.own_near", near_similarity_);
    io.values("adaptive.own_half", half_period_similarity_);
    io.values("adaptive.trends", trends_);
    io.values("adaptive.starving", starving_);
    if (feedforward_) feedforward_->exchange(io);
  }

 private:
  // Every lag near the first, then wider spaced ones: an oscillation with a longer half period has a broader
  // correlation.
  static std::vector<std::size_t> lags_from(std::size_t first) {
    std::vector<std::size_t> lags;
    for (std::size_t lag = first; lag <= 3 * first + 9; lag += 1 + (lag - first) / 4) lags.push_back(lag);
    return lags;
  }

  void choose_form(bool gap) {
    form_known_ = true;
    uses_gap_ = gap;
    const Gains& form = gap                                  ? kGapGains
                        : score_space_ == ScoreSpace::kLogit ? kCountsLogitGains
                                                             : kCountsGains;
    const double share = 1.0 / static_cast<double>(first_lag_);
    gain_min_ = share * (options_.gain_min > 0 ? options_.gain_min : form.min);
    gain_max_ = share * (options_.gain_max > 0 ? options_.gain_max : form.max);
    gain_ = std::clamp(share * (options_.gain > 0 ? options_.gain : form.first), gain_min_,
                       std::max(gain_min_, gain_max_));
    const double far_first = options_.adaptation > 0 ? kFarFirst : 1;
    far_gain_ = std::max(gain_, std::min(far_first * gain_, gain_max_));
  }

  std::optional<double> measured_gap(const RoutingStats& stats) const {
    const std::optional<double> mean = stats.mean_gap();
    if (!mean || !(*mean >= 0)) return std::nullopt;
    return stats.mean_choices() * *mean;
  }

  // False if the gap is the unit and no gap was ever seen: then no step can be made.
  bool follow_gap(std::optional<double> gap) {
    if (!uses_gap_) return true;
    if (gap) gap_ = gap_known_ ? gap_ + options_.gap_ema * (*gap - gap_) : *gap;
    gap_known_ = gap_known_ || gap.has_value();
    return gap_known_;
  }

  void measure_errors(const LayerView& layer) {
    const std::span<const std::int64_t> counts = layer.stats.counts();
    const auto total = static_cast<double>(layer.stats.assignments());
    // A separate loop for the conversion, because it is the only part that does not vectorise.
    for (std::size_t i = 0; i < experts_; ++i) errors_[i] = static_cast<double>(counts[i]);
    for (std::size_t i = 0; i < experts_; ++i) {
      const double target = layer.targets[i] * total;
      const double missing = target - errors_[i];
      // An expert with target 0 has error -1 as soon as it receives a token.
      const double untargeted = missing < 0 ? -1.0 : 0.0;
      const double error = missing / (target > 0 ? target : 1.0);
      errors_[i] = target > 0 ? error : untargeted;
    }
  }

  // Correlates the errors with those of earlier windows, updates the gains, and stores the errors.
  void tune_gains(const std::optional<double>& floor) {
    const double norm = std::sqrt(dot(errors_, errors_));
    const auto rows = static_cast<std::int64_t>(norms_.size());
    double nearest = 0, lowest = 0;
    for (std::size_t j = 0; j < lags_.size(); ++j) {
      const auto lag = static_cast<std::int64_t>(lags_[j]);
      if (lag > windows_seen_) break;
      const auto row = static_cast<std::size_t>((windows_seen_ - lag) % rows);
      const double scale = norm * norms_[row];
      const double r = scale > 0 ? dot(errors_, {&history_[row * experts_], experts_}) / scale : 0;
      correlations_[j] += options_.correlation_ema * (r - correlations_[j]);
      lowest = std::min(lowest, correlations_[j]);
      if (j == 0) nearest = r;
    }
    const double chance = kSignificance / std::sqrt(std::max(1.0, static_cast<double>(experts_) - 1.0));
    double drive = lowest < -chance ? lowest : nearest;
    if (limited_) drive = std::min(drive, 0.0);
    oscillates_ = lowest < -chance;
    const double rms = norm / std::sqrt(static_cast<double>(experts_));
    trend_decay_ = lowest < -chance ? std::max(0.0, 1 + lowest + chance) : 1.0;
    if (rms < kNegligibleError) trend_decay_ = std::min(trend_decay_, 1 - kTrendRate);
    follow_noise(floor.value_or(0), rms, nearest);
    far_gain_ = tuned(far_gain_, signal_weight(rms * inverse_far_error_) * drive);
    gain_ = tuned(gain_, drive);
    far_gain_ = std::max(far_gain_, gain_);
    compare_with_last();
    if (options_.per_expert) share_gain();
    const auto row = static_cast<std::size_t>(windows_seen_ % rows);
    std::copy(errors_.begin(), errors_.end(), history_.begin() + static_cast<std::ptrdiff_t>(row * experts_));
    norms_[row] = norm;
    ++windows_seen_;
  }

  // Noise: the level of errors that do not resemble the last ones, at least the floor. One window can raise it only a
  // little.
  void follow_noise(double floor, double rms, double resemblance) {
    const double square = rms * rms;
    if (windows_seen_ == 0) noise_sq_ = floor > 0 ? floor * floor : square;
    // Without an earlier window to compare with, no error counts as noise.
    if (windows_seen_ < static_cast<std::int64_t>(first_lag_)) resemblance = 1;
    const double unlike = std::min(square, kNoiseStep * noise_sq_) * (1 - std::max(resemblance, 0.0));
    noise_sq_ = std::max(noise_sq_ + kNoiseEma * (unlike - noise_sq_), floor * floor);
    inverse_far_error_ = noise_sq_ > 0 ? 1 / (kFar * std::sqrt(noise_sq_)) : 0;
  }

  double tuned(double gain, double drive) const {
    const double rate = options_.adaptation / static_cast<double>(first_lag_);
    return std::min(std::max(gain * std::exp(rate * drive), gain_min_), gain_max_);
  }

  void compare_with_last() {
    const std::span<const double> last = errors_before(static_cast<std::int64_t>(first_lag_));
    const double inverse_far_error = inverse_far_error_;
    for (std::size_t i = 0; i < last.size(); ++i) {
      lag_similarity_[i] = similarity(errors_[i], last[i]);
      const double stays = signal_weight(errors_[i] * inverse_far_error) * std::max(lag_similarity_[i], 0.0);
      far_persistence_[i] += kPersistenceEma * (stays - far_persistence_[i]);
    }
  }

  // Moves for an error of 1, in score units: the base step, the extra step for far errors, and the trend's rate.
  struct Step {
    double base, far_extra, trend_rate;
  };
  Step step_now() const {
    const double unit = !uses_gap_ ? 1.0 : gap_ > 0 ? gap_ : tie_unit();
    const bool learns = !limited_ && far_gain_ > 0;
    const double rate = learns ? kTrendRate * gain_ / (far_gain_ * static_cast<double>(first_lag_)) : 0;
    return {gain_ * unit, (far_gain_ - gain_) * unit, rate * gain_ * unit};
  }
  // Where all scores are equal, as in a router that starts at zero, the gap is no unit. The first step of the form
  // `counts` parts them.
  double tie_unit() const {
    const bool logits = score_space_ == ScoreSpace::kLogit;
    return (logits ? kCountsLogitGains : kCountsGains).first / kGapGains.first;
  }
  double integral_step(const Step& step, std::size_t i) const {
    return gain_shares_[i] * (step.base + step.far_extra * far_persistence_[i]) * clip_error(errors_[i]);
  }

  void move(const Step& step, std::span<double> bias) {
    const double inverse_far_error = inverse_far_error_, kept = trend_decay_;
    for (std::size_t i = 0; i < experts_; ++i) {
      const double sure = signal_weight(errors_[i] * inverse_far_error);
      trends_[i] = kept * trends_[i] + step.trend_rate * gain_shares_[i] * (1 - sure) * errors_[i];
      bias[i] += integral_step(step, i) + trends_[i];
    }
  }

  // For a starving expert: half of the missing bias according to the margins, in place of the integral step.
  void rescue(const LayerView& layer, const Step& step, std::span<double> bias) {
    const bool known = layer.stats.has_margins();
    const auto total = static_cast<double>(layer.stats.assignments());
    for (std::size_t i = 0; i < experts_; ++i) {
      starving_[i] = errors_[i] > kStarving ? starving_[i] + 1 : 0;
      if (!known || starving_[i] < kStarvedFor) continue;
      const double lacking =
          margin_quantile(layer.stats.margins(static_cast<int>(i)), layer.targets[i] * total);
      bias[i] += kRescue * lacking - integral_step(step, i) - trends_[i];
      trends_[i] = 0;
    }
  }

  std::span<const double> errors_before(std::int64_t lag) const {
    if (lag > windows_seen_) return {};
    const auto row =
        static_cast<std::size_t>((windows_seen_ - lag) % static_cast<std::int64_t>(norms_.size()));
    return {&history_[row * experts_], experts_};
  }

  // Updates each expert's share of the gain by its own correlation. The geometric mean of the shares stays 1.
  void share_gain() {
    const auto delay = static_cast<double>(first_lag_);
    const double weight = kShareEma / delay, chance = kShareSignificance / std::sqrt(delay);
    const auto near_lag = static_cast<std::int64_t>(first_lag_), half_lag = 2 * near_lag - 1;
    if (near_lag <= windows_seen_) {
      for (std::size_t i = 0; i < experts_; ++i)
        near_similarity_[i] += weight * (lag_similarity_[i] - near_similarity_[i]);
    }
    const std::span<const double> before = near_lag > 1 ? errors_before(half_lag) : std::span<const double>();
    for (std::size_t i = 0; i < before.size(); ++i) {
      half_period_similarity_[i] += weight * (similarity(errors_[i], before[i]) - half_period_similarity_[i]);
    }
    const std::span<const double> half = first_lag_ > 1 ? half_period_similarity_ : near_similarity_;
    double moved = 0;
    for (std::size_t i = 0; i < experts_; ++i) {
      if (half[i] < -chance) {
        moved += scale_share(i, kShareFall / delay * half[i]);
      } else if (near_similarity_[i] > chance && !limited_ && !oscillates_) {
        moved += scale_share(i, kShareRise / delay * near_similarity_[i]);
      }
    }
    if (moved == 0) return;
    const double common = std::exp(-moved / static_cast<double>(experts_));
    for (double& share : gain_shares_) share = std::min(std::max(share * common, kShareMin), kShareMax);
  }

  // Returns the change of the share's logarithm.
  double scale_share(std::size_t i, double by) {
    double& share = gain_shares_[i];
    const double bound = by < 0 ? kShareMin : kShareMax;
    if (share == bound) return 0;
    const double wanted = share * std::exp(by);
    if (by < 0 ? wanted > bound : wanted < bound) {
      share = wanted;
      return by;
    }
    return std::log(bound / std::exchange(share, bound));
  }

  Options options_;
  ScoreSpace score_space_;
  std::size_t first_lag_;
  std::vector<std::size_t> lags_;
  std::size_t experts_;
  bool form_known_ = false, uses_gap_ = false;
  double gain_ = 0, far_gain_ = 0, gain_min_ = 0, gain_max_ = 0;  // g, F and their bounds
  bool gap_known_ = false;
  double gap_ = 0;
  bool limited_ = false;
  bool planned_ = false;  // the last propose() went through to its end
  std::optional<Feedforward> feedforward_;
  std::vector<double> errors_;
  std::vector<std::int64_t> starving_;  // steps in a row [N]; empty without rescue
  std::vector<double> history_;         // [rows × N], a ring: the errors of window w in row w % rows
  std::vector<double> norms_;           // [rows]
  std::vector<double> correlations_;
  std::vector<double> lag_similarity_;   // similarity of each error to the one D windows before [N]
  std::vector<double> far_persistence_;  // λ: how long each error has been far above the noise, [0, 1] [N]
  std::vector<double> gain_shares_;      // h [N]
  std::vector<double> near_similarity_, half_period_similarity_;  // ρ(D), ρ(2D-1) [N]
  double noise_sq_ = 0;                                           // n²
  double inverse_far_error_ = 0;                                  // 1/4n; 0 = not known
  bool oscillates_ = false;
  double trend_decay_ = 1;      // factor on the trends at this step
  std::vector<double> trends_;  // t [N]
  std::int64_t windows_seen_ = 0;
};

std::string check(const PolicyContext& context, const PolicyOptions& options) {
  const Options o = Options::from(options);
  if (o.form == "gap" && context.top_k >= context.experts) {
    return "form: gap: needs top_k below the number of experts";
  }
  if (o.feedforward == "tags") {
    if (context.domains < 2) return "feedforward: tags: needs at least two domains in model.domains";
    if (o.form == "counts") return "feedforward: tags: needs the gap";
    if (context.delay > 0)
      return "feedforward: tags: needs routing that is not late (model.delay: 0, lag: 0)";
    if (context.cadence > 1)
      return "feedforward: tags: needs a decision for every batch, since each has a mixture of its own "
             "(limits.cadence: 1)";
  }
  if (o.rescue) {
    if (context.top_k >= context.experts) return "rescue: true: needs top_k below the number of experts";
    if (context.delay > 0) return "rescue: true: needs routing that is not late (model.delay: 0, lag: 0)";
  }
  if (o.gain_min > 0 && o.gain_max > 0 && o.gain_min > o.gain_max)
    return "gain_min: must not exceed gain_max";
  return "";
}

}  // namespace

PolicyDescription adaptive_bias() {
  const Options defaults;
  PolicyDescription d;
  d.name = "adaptive_bias";
  d.summary = "integral step in units of the score gap, with a gain that tunes itself until errors are white";
  d.actuators = {Actuator::kExpertBias};
  d.options = {
      {.name = "form",
       .default_value = defaults.form,
       .unit = "",
       .description =
           "unit of the step: the score gap, or counts only; auto = the gap if the router gives it",
       .choices = {"auto", "gap", "counts"}},
      {.name = "gain",
       .default_value = defaults.gain,
       .unit = "gaps (counts: score)",
       .description = "first gain; 0 = the form's own: gap 0.25, counts 0.001 (logits 0.01)",
       .min = 0,
       .max = 1e6},
      {.name = "gain_min",
       .default_value = defaults.gain_min,
       .unit = "gaps (counts: score)",
       .description = "smallest gain; 0 = the form's own: gap 0.001, counts 1e-6",
       .min = 0,
       .max = 1e6},
      {.name = "gain_max",
       .default_value = defaults.gain_max,
       .unit = "gaps (counts: score)",
       .description = "largest gain; 0 = the form's own: 1",
       .min = 0,
       .max = 1e6},
      {.name = "adaptation",
       .default_value = defaults.adaptation,
       .unit = "1/step",
       .description = "how fast the gain follows the correlation of the errors; 0 = one fixed gain",
       .min = 0,
       .max = 1},
      {.name = "correlation_ema",
       .default_value = defaults.correlation_ema,
       .unit = "",
       .description = "weight of the newest correlation in its average",
       .min = 1e-3,
       .max = 1},
      {.name = "gap_ema",
       .default_value = defaults.gap_ema,
       .unit = "",
       .description = "weight of the newest gap in its average",
       .min = 1e-3,
       .max = 1},
      {.name = "per_expert",
       .default_value = defaults.per_expert,
       .unit = "",
       .description = "let each expert's own correlation move its share of the gain"},
      {.name = "feedforward",
       .default_value = defaults.feedforward,
       .unit = "",
       .description = "tags: cancel ahead what the next batch's domain mixture will do to the loads",
       .choices = {"off", "tags"}},
      {.name = "feedforward_share",
       .default_value = defaults.feedforward_share,
       .unit = "",
       .description = "f: share of the expected imbalance that is cancelled ahead",
       .min = 0,
       .max = 1},
      {.name = "rescue",
       .default_value = defaults.rescue,
       .unit = "",
       .description = "bring starved experts back by their margins; wants all of the router's scores"},
  };
  d.make = [](const PolicyContext& context, const PolicyOptions& options) {
    return std::make_unique<AdaptiveBias>(Options::from(options), context);
  };
  d.check = check;
  return d;
}

}  // namespace moectl::policies
