// LoadTargets: the target share of the load of each expert, and loads relative to it.
//
// All judgements of balance use relative loads. Of S assignments, expert i with target share w_i should get w_i S:
//
//   relative load = c_i / (w_i S)        if w_i > 0; 1 on target
//                 = 1 + c_i / (S/M)      if w_i = 0: an expert that should receive no tokens
//
// M is the number of experts with a target above 0, so S/M is the mean target. Example: S = 100, targets (0.5, 0.5, 0),
// counts (45, 45, 10): relative loads 0.9, 0.9 and 1 + 10/50 = 1.2.
#pragma once

#include <span>
#include <vector>

namespace moectl {

class LoadTargets {
 public:
  /// Shares [N], each in [0, 1], summing to 1 within 1e-6. Empty, or N equal shares: equal targets. Throws
  /// std::invalid_argument.
  explicit LoadTargets(int experts, std::span<const double> shares = {});

  int experts() const { return experts_; }  ///< N.
  bool equal() const { return shares_.empty(); }
  /// w [N]; empty if equal.
  std::span<const double> shares() const { return shares_; }
  /// M: number of experts with a target above 0.
  int wanted() const { return wanted_; }
  bool is_wanted(std::size_t expert) const { return equal() || shares_[expert] > 0; }
  /// Target number of assignments of the expert, of `sum` in all.
  double load(std::size_t expert, double sum) const {
    return equal() ? sum / experts_ : shares_[expert] * sum;
  }
  /// Relative load of an expert with `count` of `sum` > 0 assignments; the formula is on top.
  double relative(std::size_t expert, double count, double sum) const {
    return is_wanted(expert) ? count / load(expert, sum) : 1 + count / (sum / wanted_);
  }

 private:
  int experts_, wanted_;
  std::vector<double> shares_;
};

}  // namespace moectl
