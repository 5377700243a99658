// LoadTargets: what share of the load each expert is to have, and what a load is relative to it.
//
// Of S assignments expert i is to get w_i S; its relative load is c_i / (w_i S), 1 on target. An expert whose target is 0
// has nothing to be relative to: what it gets counts in mean targets S/M on top of the 1 that it has without any token,
// M being the number of experts that are to get something. Everything that judges a load judges relative loads.
#pragma once

#include <span>
#include <vector>

namespace moectl {

class LoadTargets {
 public:
  /// Shares [N], each in [0, 1], summing to 1 within 1e-6; none, or N equal ones, are equal targets. Throws
  /// std::invalid_argument.
  explicit LoadTargets(int experts, std::span<const double> shares = {});

  int experts() const { return experts_; }  ///< N.
  bool equal() const { return shares_.empty(); }
  /// w [N]; empty if equal.
  std::span<const double> shares() const { return shares_; }
  /// M: experts with a target above 0.
  int wanted() const { return wanted_; }
  bool is_wanted(std::size_t expert) const { return equal() || shares_[expert] > 0; }
  /// Assignments that the expert is to get of `sum`.
  double load(std::size_t expert, double sum) const {
    return equal() ? sum / experts_ : shares_[expert] * sum;
  }
  /// Relative load of an expert with `count` of `sum` > 0 assignments.
  double relative(std::size_t expert, double count, double sum) const {
    return is_wanted(expert) ? count / load(expert, sum) : 1 + count / (sum / wanted_);
  }

 private:
  int experts_, wanted_;
  std::vector<double> shares_;
};

}  // namespace moectl
