#include "watch/trend.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "base/lanes.h"

namespace moectl {
namespace {

// Sums over the pairs in which both values are known.
struct Moments {
  double count = 0, mean_x = 0, mean_y = 0, xx = 0, yy = 0, xy = 0;
};

template <class X, class Y>
Moments moments(std::size_t size, const X& x, const Y& y) {
  Moments m;
  for (std::size_t i = 0; i < size; ++i) {
    if (std::isnan(x(i)) || std::isnan(y(i))) continue;
    m.count += 1;
    m.mean_x += x(i);
    m.mean_y += y(i);
  }
  if (m.count == 0) return m;
  m.mean_x /= m.count;
  m.mean_y /= m.count;
  for (std::size_t i = 0; i < size; ++i) {
    if (std::isnan(x(i)) || std::isnan(y(i))) continue;
    const double dx = x(i) - m.mean_x, dy = y(i) - m.mean_y;
    m.xx += dx * dx;
    m.yy += dy * dy;
    m.xy += dx * dy;
  }
  return m;
}

Moments over_time(std::span<const double> values) {
  return moments(
      values.size(), [](std::size_t i) { return static_cast<double>(i); },
      [&](std::size_t i) { return values[i]; });
}

// Calls `visit` with the residual of each known value from the regression line, in order. False if there are fewer than
// four values, or all residuals are rounding.
template <class Visit>
bool residuals(std::span<const double> values, const Visit& visit) {
  const Moments m = over_time(values);
  if (m.count < 4 || m.xx == 0) return false;
  const double slope = m.xy / m.xx;
  const double left = m.yy - slope * m.xy;
  if (!(left > 1e-24 * (m.yy + m.count * m.mean_y * m.mean_y))) return false;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (std::isnan(values[i])) continue;
    visit(values[i] - m.mean_y - slope * (static_cast<double>(i) - m.mean_x));
  }
  return true;
}

constexpr double kMostShift = 1e6;  // of a load that never moved before

/// Of deviations with these norms; 0 of what no run can have recorded.
double correlation_of(double products, double norms) {
  const double r = products / norms;
  return std::isnan(r) ? 0 : std::clamp(r, -1.0, 1.0);
}

}  // namespace

std::optional<double> slope(std::span<const double> values) {
  // If every value is known, one pass is enough: time, measured from the middle, is orthogonal to the mean.
  const double middle = (static_cast<double>(values.size()) - 1) / 2;
  double sum = 0, moment = 0, spread = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double from_middle = static_cast<double>(i) - middle;
    sum += values[i];
    moment += from_middle * (values[i] - values[0]);  // of a constant exactly 0
    spread += from_middle * from_middle;
  }
  if (spread > 0 && !std::isnan(sum)) return moment / spread;
  const Moments m = over_time(values);
  if (m.count < 2) return std::nullopt;
  return m.xy / m.xx;
}

std::optional<double> autocorrelation(std::span<const double> values) {
  double last = 0, products = 0, squares = 0;
  bool first = true;
  const bool defined = residuals(values, [&](double e) {
    if (!first) products += e * last;
    squares += e * e;
    last = e;
    first = false;
  });
  if (!defined) return std::nullopt;
  return products / squares;
}

std::optional<double> sign_flips(std::span<const double> values) {
  double last = 0, flips = 0, pairs = -1;
  const bool defined = residuals(values, [&](double e) {
    flips += e * last < 0 ? 1 : 0;
    pairs += 1;
    last = e;
  });
  if (!defined) return std::nullopt;
  return flips / pairs;
}

std::optional<double> correlation(std::span<const double> x, std::span<const double> y) {
  return regression(x, y).correlation;
}

Regression regression(std::span<const double> x, std::span<const double> y) {
  const Moments m = moments(
      std::min(x.size(), y.size()), [&](std::size_t i) { return x[i]; }, [&](std::size_t i) { return y[i]; });
  const auto varies = [&](double squares, double mean) { return squares > 1e-24 * m.count * mean * mean; };
  Regression line;
  if (m.count >= 2 && m.xx > 0) line.slope = m.xy / m.xx;
  if (m.count >= 3 && varies(m.xx, m.mean_x) && varies(m.yy, m.mean_y)) {
    line.correlation = std::clamp(m.xy / std::sqrt(m.xx) / std::sqrt(m.yy), -1.0, 1.0);
  }
  return line;
}

// ---- History ----

void History::push(double value) {
  if (begin_ + size_ == values_.size()) {
    std::copy(values_.end() - static_cast<std::ptrdiff_t>(size_), values_.end(), values_.begin());
    begin_ = 0;
  }
  if (size_ == window()) {
    ++begin_;
    --size_;
    if (begin_ + size_ == values_.size()) {
      std::copy(values_.begin() + static_cast<std::ptrdiff_t>(begin_), values_.end(), values_.begin());
      begin_ = 0;
    }
  }
  values_[begin_ + size_++] = value;
}

void History::exchange(StateIo& io) {
  auto size = static_cast<std::int64_t>(size_);
  io.value("history.size", size, {0, static_cast<std::int64_t>(window())});
  std::vector<double> all(window(), 0.0);  // in a state of constant length
  std::copy_n(values().begin(), size_, all.begin());
  io.values("history.values", all, StateIo::kAnyNumber);
  begin_ = 0;
  size_ = static_cast<std::size_t>(size);
  std::copy_n(all.begin(), size_, values_.begin());
}

// ---- HistoryTable ----

std::span<double> HistoryTable::push() {
  const auto row = static_cast<std::size_t>(pushed_++) % window();
  return std::span(rows_).subspan(row * columns_, columns_);
}

std::vector<double> HistoryTable::column(std::size_t which) const {
  const auto pushed = static_cast<std::size_t>(pushed_), size = std::min(pushed, window());
  std::vector<double> values(size);
  for (std::size_t i = 0; i < size; ++i) {
    values[i] = rows_[(pushed - size + i) % window() * columns_ + which];
  }
  return values;
}

void HistoryTable::exchange(StateIo& io) {
  io.value("history.pushed", pushed_);
  io.values("history.rows", rows_, StateIo::kAnyNumber);
}

// ---- LoadTrend ----

LoadTrend::LoadTrend(const LoadTargets& targets, int window, double ema)
    : experts_(static_cast<std::size_t>(targets.experts())),
      half_window_(std::max(1, window / 2)),
      ema_(ema),
      wanted_(targets.wanted()),
      loads_(kMemory * experts_),
      deviations_(kMemory * experts_),
      root_(experts_) {
  for (std::size_t i = 0; i < targets.shares().size(); ++i)
    relative_.push_back(targets.is_wanted(i) ? 1 / targets.load(i, 1) : wanted_);
  for (Block* block : {&before_, &now_}) {
    block->mean.resize(experts_);
    block->squares.resize(experts_);
    block->first_root.resize(experts_);
  }
}

std::span<double> LoadTrend::past(std::vector<double>& ring, std::size_t ago) {
  const std::size_t at = (static_cast<std::size_t>(steps_) + kMemory - ago) % kMemory;
  return std::span(ring).subspan(at * experts_, experts_);
}

void LoadTrend::observe(std::span<const double> load, std::span<const double> smoothed, Metrics& metrics) {
  const std::span<double> kept = past(loads_, 0), deviation = past(deviations_, 0);
  // Of what it has come to replace, the oldest deviation is still wanted: lag 8 is taken before it is
  // overwritten.
  const Double8 known = splat(steps_ == 0 ? 0 : 1);  // the first step has no deviation
  Double8 oldest = splat(0), squares = splat(0);
  for_each_eight(experts_, [&](std::size_t i, auto at) {
    const Double8 p = at.get(&load[i]), e = (p - at.get(&smoothed[i])) * known;
    oldest += e * at.get(&deviation[i]);
    squares += e * e;
    at.put(&kept[i], p);
    at.put(&deviation[i], e);
  });
  const double norm = sum_of(squares);
  const auto at = static_cast<std::size_t>(steps_) % kMemory;
  const double old_norm = norms_[at];
  norms_[at] = std::sqrt(norm);
  double relative_sq = norm * static_cast<double>(experts_);
  if (!relative_.empty()) {
    relative_sq = sum_over(experts_,
                           [&](std::size_t i, auto at_i) -> Double8 {
                             const Double8 e = at_i.get(&deviation[i]) * at_i.get(&relative_[i]);
                             return e * e;
                           }) /
                  wanted_;
  }
  deviation_sq_ += ema_ * (relative_sq - deviation_sq_);
  if (old_norm > 0 && norms_[at] > 0) {
    lagged_.back() += ema_ * (correlation_of(sum_of(oldest), old_norm * norms_[at]) - lagged_.back());
  }
  correlate(metrics);
  accumulate(load, metrics);
  ++steps_;
}

void LoadTrend::correlate(Metrics& metrics) {
  if (steps_ < 2) return;  // the first step has no deviation
  const std::span<const double> now = past(deviations_, 0), last = past(deviations_, 1);
  constexpr std::size_t kShort = kLags.size() - 1;  // the longest lag is taken already
  std::array<const double*, kShort> then;
  for (std::size_t l = 0; l < kShort; ++l) {
    then[l] = past(deviations_, static_cast<std::size_t>(kLags[l])).data();
  }
  std::array<Double8, kShort> products;
  products.fill(splat(0));
  Double8 flips = splat(0);
  for_each_eight(experts_, [&](std::size_t i, auto at) {
    const Double8 e = at.get(&now[i]);
    for (std::size_t l = 0; l < kShort; ++l) products[l] += e * at.get(then[l] + i);
    flips += less(e * at.get(&last[i]), splat(0));
  });
  const double norm = norms_[static_cast<std::size_t>(steps_) % kMemory];
  for (std::size_t l = 0; l < kShort; ++l) {
    const auto lag = static_cast<std::size_t>(kLags[l]);
    const double then_norm = norms_[(static_cast<std::size_t>(steps_) + kMemory - lag) % kMemory];
    if (steps_ <= kLags[l] || !(norm > 0) || !(then_norm > 0)) continue;
    lagged_[l] += ema_ * (correlation_of(sum_of(products[l]), norm * then_norm) - lagged_[l]);
  }
  flips_ += ema_ * (sum_of(flips) / static_cast<double>(experts_) - flips_);
  metrics.load_autocorrelation = std::clamp(lagged_[0], -1.0, 1.0);
  metrics.oscillation = flips_;
  metrics.swing = swing();
}

// A load that repeats after P steps has correlation 1 at lag P. Its deviations sum to 0 over a period, so the
// correlations at the lags before P sum to -1. The correlation of a drift falls with the lag; noise has none.
double LoadTrend::swing() const {
  double most = -*std::min_element(lagged_.begin(), lagged_.end());
  double before = lagged_[0];
  for (std::size_t l = 1; l < kLags.size() && kLags[l] == static_cast<int>(l) + 1; ++l) {
    const auto others = static_cast<double>(l);
    most = std::max(most, others / (others + 1) * (lagged_[l] - before / others));
    before += lagged_[l];
  }
  return std::clamp(most, 0.0, 1.0);
}

void LoadTrend::accumulate(std::span<const double> load, Metrics& metrics) {
  if (now_.steps == half_window_) {
    std::swap(before_, now_);
    now_.steps = 0;
  }
  // One pass: the distance from the last load, the block's mean and squares (Welford), both blocks' variance (Chan).
  const auto count = static_cast<double>(++now_.steps);
  const bool first = now_.steps == 1, have_last = steps_ > 0, have_before = before_.steps > 0;
  if (first) {
    std::fill(now_.mean.begin(), now_.mean.end(), 0.0);
    std::fill(now_.squares.begin(), now_.squares.end(), 0.0);
    now_.path = 0;
  }
  const double share = 1 / count;
  const double joint = have_before ? static_cast<double>(before_.steps) * count : 0;
  const double total = count + (have_before ? static_cast<double>(before_.steps) : 0);
  const std::vector<double>& start = have_before ? before_.first_root : now_.first_root;
  Double8 step_sq = splat(0), way_sq = splat(0), squares = splat(0), apart_sq = splat(0);
  for_each_eight(experts_, [&](std::size_t i, auto at) {
    const Double8 p = at.get(&load[i]), root = p.sqrt(), moved = root - at.get(&root_[i]);
    step_sq += moved * moved;
    at.put(&root_[i], root);
    if (first) at.put(&now_.first_root[i], root);
    const Double8 way = root - at.get(&start[i]);
    way_sq += way * way;
    Double8 mean = at.get(&now_.mean[i]);
    const Double8 off = p - mean;
    mean += off * share;
    const Double8 of_block = at.get(&now_.squares[i]) + off * (p - mean);
    at.put(&now_.mean[i], mean);
    at.put(&now_.squares[i], of_block);
    squares += of_block;
    if (have_before) {
      const Double8 apart = mean - at.get(&before_.mean[i]);
      squares += at.get(&before_.squares[i]);
      apart_sq += apart * apart;
    }
  });
  const auto distance = [](const Double8& sq) {
    return 4 * std::asin(std::min(1.0, std::sqrt(sum_of(sq)) / 2));
  };
  (first ? now_.entry : now_.path) =
      first ? (have_last ? distance(step_sq) : 0) : now_.path + distance(step_sq);
  metrics.routing_variance =
      (sum_of(squares) + sum_of(apart_sq) * (joint / total)) / total / static_cast<double>(experts_);
  const double path = now_.path + (have_before ? now_.entry + before_.path : 0);
  if (path > 0) metrics.path_efficiency = std::min(1.0, distance(way_sq) / path);
  if (steps_ % kShiftEvery == 0) last_shift_ = shift().value_or(last_shift_);
  if (have_before) metrics.shift = last_shift_;
}

std::optional<double> LoadTrend::shift() const {
  const auto recent = static_cast<std::size_t>(std::min<std::int64_t>(kMemory, half_window_));
  if (before_.steps < 2 || now_.steps < static_cast<std::int64_t>(recent) || experts_ < 2)
    return std::nullopt;
  std::array<const double*, kMemory> rows{};
  for (std::size_t ago = 0; ago < recent; ++ago) {
    rows[ago] = &loads_[(static_cast<std::size_t>(steps_) - ago) % kMemory * experts_];
  }
  const double share = 1 / static_cast<double>(recent);
  Double8 moved_sq = splat(0), expected_sq = splat(0);
  for_each_eight(experts_, [&](std::size_t i, auto at) {
    Double8 mean = splat(0);
    for (std::size_t ago = 0; ago < recent; ++ago) mean += at.get(rows[ago] + i);
    const Double8 apart = mean * share - at.get(&before_.mean[i]);
    moved_sq += apart * apart;
    expected_sq += at.get(&before_.squares[i]);
  });
  const double moved = sum_of(moved_sq);
  const auto n = static_cast<double>(before_.steps);
  const double expected = sum_of(expected_sq) * (share + 1 / n) / (n - 1);
  const double threshold = 1 + 6 * std::sqrt(2 / static_cast<double>(experts_ - 1));
  if (moved == 0) return 0;
  return expected > 0 ? std::min(kMostShift, moved / expected / threshold) : kMostShift;
}

double LoadTrend::deviation_cv() const {
  return std::sqrt(deviation_sq_);
}

void LoadTrend::exchange(StateIo& io) {
  // Of shares; sums that rounding may take beyond their bounds have room.
  constexpr NumberRange kShare{0, 1}, kNear{-2, 2};
  io.value("trend.steps", steps_);
  io.values("trend.loads", loads_, kShare);
  io.values("trend.deviations", deviations_, {-1, 1});
  io.values("trend.norms", norms_, {0, 2});
  io.values("trend.lagged", lagged_, kNear);
  io.value("trend.flips", flips_, {0, 1});
  io.value("trend.deviation_sq", deviation_sq_, StateIo::kNotNegative);
  io.value("trend.last_shift", last_shift_, {0, kMostShift});
  for (Block* block : {&before_, &now_}) {
    io.value("trend.block.steps", block->steps, {0, half_window_});
    io.value("trend.block.entry", block->entry, StateIo::kNotNegative);
    io.value("trend.block.path", block->path, StateIo::kNotNegative);
    io.values("trend.block.mean", block->mean, kShare);
    // No step adds more than 1.
    io.values("trend.block.squares", block->squares, {-1, static_cast<double>(block->steps) + 1});
    io.values("trend.block.first_root", block->first_root, kShare);
  }
  io.values("trend.root", root_, kShare);
}

}  // namespace moectl
