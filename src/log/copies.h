// Ranks that hold the same tokens.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace moectl {

/// What one rank chose in one layer of one step.
struct RankLayer {
  std::pair<int, std::string_view> key;  ///< Layer and tag.
  int top_k = 0;
  std::optional<std::int64_t> tokens;
  std::span<const std::int64_t> counts;
};

/// Which ranks hold the same tokens, as those of tensor parallelism do: their sum would count each token several times.
/// Two ranks are copies if they hold the same counts wherever both have a layer of a step, and if their tokens are so many that
/// chance does not make that. Dumps and traces are judged by this one rule.
///
/// Steps come one by one. A pair of ranks is *open* while they agree on too few tokens. What is not open stays as it is: two
/// ranks that differ once are no copies of each other, and copies that differ later are an error. So what has been decided for the
/// steps so far is what the whole trace says. With R ranks, L layers and N experts: R² bits and R · L · N numbers.
class RankCopies {
 public:
  /// `advice` ends the messages: what to do with ranks that cannot be told.
  explicit RankCopies(std::string advice) : advice_(std::move(advice)) {}
  /// One more rank; returns its place, counted from 0.
  std::size_t add(std::string name);
  /// One step: for each place what the rank holds, ascending by key; empty = nothing. Throws LogError if ranks differ that
  /// were copies so far, or if a rank is a copy of two that differ.
  void see(std::int64_t step, const std::vector<std::vector<RankLayer>>& ranks);
  /// Whether some pair is open.
  bool open() const { return open_.has_value(); }
  /// After the last step. Throws LogError if some pair is open.
  void decide() const;
  /// The place of the first copy of a rank, which may be the rank itself.
  std::size_t first_of(std::size_t place) const { return first_[place]; }
  /// Whether there are several ranks that are no copies of each other.
  bool several() const;
  /// Which ranks are copies, in words; empty = none.
  std::string note() const;

 private:
  struct Choices {
    double orders = 0;  // Σ over steps of log(T! / Π c_i!)
    std::vector<std::int64_t> counts;
  };
  double chance(std::size_t place) const;
  bool nothing(std::size_t place) const;
  void learn(std::size_t place, const std::vector<RankLayer>& layers);
  void group();

  std::string advice_;
  std::vector<std::string> names_;
  std::vector<std::vector<bool>> met_, differ_;  // of two ranks, the later place first
  std::vector<std::map<std::pair<int, std::string>, Choices>> layers_;
  std::vector<bool> told_;  // whether its choices are too many for another rank to make the same by chance
  std::vector<std::size_t> first_;
  std::optional<std::pair<std::size_t, std::size_t>> open_;
};

}  // namespace moectl
