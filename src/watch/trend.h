// Trends: statistics of a series of values, and of a series of load vectors. Time is counted in control steps with
// data.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "moectl/metrics.h"
#include "moectl/state.h"

namespace moectl {

// Values are oldest first; NaN = no value at that step, which is skipped. A result is absent if there are too few
// values or no spread.

/// Least-squares slope per step; needs two values.
std::optional<double> slope(std::span<const double> values);
/// Lag-1 autocorrelation of the residuals of the regression line, [-1, 1]; needs four values.
std::optional<double> autocorrelation(std::span<const double> values);
/// Share of neighbours between which the residual of the regression line changes sign, [0, 1]: ½ for white noise, 1 for
/// a steady alternation; needs four values.
std::optional<double> sign_flips(std::span<const double> values);
/// Pearson's correlation of two series of equal length; needs three pairs.
std::optional<double> correlation(std::span<const double> x, std::span<const double> y);
/// The least-squares line of y on x.
struct Regression {
  std::optional<double> slope;        ///< Needs two pairs.
  std::optional<double> correlation;  ///< Needs three.
};
Regression regression(std::span<const double> x, std::span<const double> y);

/// The last values of one number, in order.
class History {
 public:
  explicit History(std::size_t window) : values_(2 * window) {}
  void push(double value);
  std::span<const double> values() const { return std::span(values_).subspan(begin_, size_); }

  void exchange(StateIo& io);

 private:
  std::size_t window() const { return values_.size() / 2; }
  std::vector<double> values_;  // a window that slides through twice its length
  std::size_t begin_ = 0, size_ = 0;
};

/// The last values of several numbers, one row per step.
class HistoryTable {
 public:
  HistoryTable(std::size_t window, std::size_t columns) : columns_(columns), rows_(window * columns) {}
  /// The row of a new step, in place of the oldest one: to be filled in.
  std::span<double> push();
  /// The values of one column, oldest first.
  std::vector<double> column(std::size_t which) const;

  void exchange(StateIo& io);

 private:
  std::size_t window() const { return rows_.size() / columns_; }
  std::size_t columns_;
  std::vector<double> rows_;  // a ring
  std::int64_t pushed_ = 0;
};

/// Trends of the load vector p. With e_t = p_t - EMA(p)_{t-1}:
///   correlation at lag l   a_l += ema (⟨e_t, e_{t-l}⟩ / (|e_t| |e_{t-l}|) - a_l)
///   swing                  the larger of two values: max_l -a_l, which is near 1 for a wave of period up to 16 (½ for
///                          period 3), and max_P (1 - 1/P) (a_P - mean of a_1 … a_{P-1}), P = 2 … 6, which is 1 for any
///                          shape that repeats after P steps (its a_P is 1, and the others sum to -1)
///   routing_variance, path_efficiency   over half to one window (two blocks, so that memory is O(N))
///   shift                  Σ (m_i - r_i)² / Σ var_i (1/8 + 1/n), m the mean of the last 8 steps; r, var, n of the block
///                          before; in units of 1 + 6 √(2/(N-1)). Above 1 = the load has moved.
class LoadTrend {
 public:
  LoadTrend(int experts, int window, double ema) : LoadTrend(LoadTargets(experts), window, ema) {}
  LoadTrend(const LoadTargets& targets, int window, double ema);

  /// `smoothed` is the EMA before this step's load; both [N]. Sets the metrics it owns. Does not allocate.
  void observe(std::span<const double> load, std::span<const double> smoothed, Metrics& metrics);
  /// CV of the deviations: root of the smoothed mean square of N e_i. With unequal targets, of e_i / w_i (M e_i where
  /// w_i = 0), over the M experts with a target above 0.
  double deviation_cv() const;

  void exchange(StateIo& io);

 private:
  static constexpr std::array<int, 7> kLags = {1, 2, 3, 4, 5, 6, 8};
  static constexpr std::size_t kMemory = 8;
  // Steps: a change of eight steps' mean can wait for its test.
  static constexpr std::int64_t kShiftEvery = 4;

  struct Block {
    std::int64_t steps = 0;
    double entry = 0;  // distance from the last load before the block
    double path = 0;   // Σ of distances inside it
    std::vector<double> mean, squares, first_root;
  };
  std::span<double> past(std::vector<double>& ring, std::size_t ago);
  void correlate(Metrics& metrics);
  double swing() const;
  void accumulate(std::span<const double> load, Metrics& metrics);
  std::optional<double> shift() const;

  std::size_t experts_;
  std::int64_t half_window_;
  double ema_;
  std::vector<double> relative_;  // with unequal targets: relative load of a load share of 1 [N]
  double wanted_;
  std::int64_t steps_ = 0;
  std::vector<double> loads_, deviations_;  // rings of the last kMemory steps, [kMemory × N]
  std::array<double, kMemory> norms_{};     // of deviations_
  std::array<double, kLags.size()> lagged_{};
  double flips_ = 0.5, deviation_sq_ = 0, last_shift_ = 0;
  Block before_, now_;
  std::vector<double> root_;  // √p of the last step
};

}  // namespace moectl
