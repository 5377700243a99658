// Trends: what a row of values over time says, and what a row of load vectors says.
// Time is counted in control steps with data.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "moectl/metrics.h"
#include "moectl/state.h"

namespace moectl {

// Values oldest first; NaN = none at that step, skipped. Absent where too few values or no spread define
// nothing.

/// Least-squares slope a step; wants two values.
std::optional<double> slope(std::span<const double> values);
/// Lag-1 autocorrelation of what the regression line leaves, [-1, 1]; wants four values.
std::optional<double> autocorrelation(std::span<const double> values);
/// Share of neighbours between which what the regression line leaves changes sign, [0, 1]: white noise ½, a
/// steady alternation 1; wants four values.
std::optional<double> sign_flips(std::span<const double> values);
/// Pearson's correlation of two rows of equal length; wants three pairs.
std::optional<double> correlation(std::span<const double> x, std::span<const double> y);
/// The least-squares line of y on x.
struct Regression {
  std::optional<double> slope;        ///< Wants two pairs.
  std::optional<double> correlation;  ///< Wants three.
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

/// The last values of several numbers, one row a step.
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
///   swing                  the larger of max_l -a_l, which a wave of a period up to 16 brings near 1 (of 3
///   to ½), and
///                          max_P (1 - 1/P) (a_P - mean of a_1 … a_{P-1}), P = 2 … 6, which is 1 of any shape
///                          that repeats after P steps (its a_P is 1, and the others sum to -1)
///   routing_variance, path_efficiency over half to one window (two blocks, so that memory is O(N))
///   shift                  Σ (m_i - r_i)² / Σ var_i (1/8 + 1/n), m the mean of the last 8 steps, r, var, n
///   of the
///                          block before; in units of 1 + 6 √(2/(N-1)). Above 1 = the load has moved.
class LoadTrend {
 public:
  LoadTrend(int experts, int window, double ema) : LoadTrend(LoadTargets(experts), window, ema) {}
  LoadTrend(const LoadTargets& targets, int window, double ema);

  /// `smoothed` is the EMA before this step's load; both [N]. Sets the metrics it owns. Does not allocate.
  void observe(std::span<const double> load, std::span<const double> smoothed, Metrics& metrics);
  /// Root of the smoothed mean square of N e_i: the CV of the deviations. With unequal targets of e_i / w_i (where
  /// w_i = 0, of M e_i), over the M experts that are wanted.
  double deviation_cv() const;

  void exchange(StateIo& io);

 private:
  static constexpr std::array<int, 7> kLags = {1, 2, 3, 4, 5, 6, 8};
  static constexpr std::size_t kMemory = 8;
  static constexpr std::int64_t kShiftEvery =
      4;  // steps: a change of eight steps' mean can wait for its test

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
  std::vector<double> relative_;  // with unequal targets: what a share of the load is in relative load, [N]
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
