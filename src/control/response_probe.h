// Test moves, and what follows from them: of the biases of a layer (BiasProbe), or of one number (scalar_response.h).
//
// A pattern of signs, + + - + - - - + over eight decisions, says where each test move goes. A line is taken out of what is
// seen, so neither noise nor a steady drift correlates with the pattern, and the regression on it is sure. The signs hardly
// correlate with themselves some steps later, so an answer that is late is told from a wrong sign.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "moectl/config.h"
#include "moectl/responsiveness.h"
#include "moectl/state.h"

namespace moectl {

inline constexpr std::array<double, 8> kProbeSigns = {1, 1, -1, 1, -1, -1, -1, 1};
/// An answer is looked for this many steps late, from 0.
inline constexpr std::size_t kProbeLags = 5;
/// Steps of a block: the decisions, one more for the end, and those in which an answer may still come.
std::size_t steps_of_block(const Limits& limits, int delay);

struct GainEstimate {
  double gain = 0, error = 0;
};
/// What a check reports. `found`: the gain that its verdict rests on, if there is one.
Responsiveness responsiveness(Response state, const std::optional<GainEstimate>& found, std::int64_t late,
                              bool scaled);
/// The estimate, unless its numbers are beyond what a state may hold.
std::optional<GainEstimate> told(GainEstimate found);
/// Three entries of a saved state, under these names.
void exchange_found(StateIo& io, const char* found, const char* gain, const char* error,
                    std::optional<GainEstimate>& estimate);

/// Sums of a regression through an instrument z: of the changes seen, y, on those expected, x.
struct GainSums {
  double zy = 0, zx = 0;
  // Σ z² times what of the noise differs: the relative load, for counts scatter in proportion to it.
  double zz = 0;
  void add(const GainSums& more, double keep);
  std::optional<GainEstimate> estimate(double noise_sq) const;
  void exchange(StateIo& io, NumberRange range);
};

/// Each step of a block: the sign in force, how far the value moved, and what was seen, both along the pattern.
class ProbeSeries {
 public:
  struct Fit {
    double zy = 0, zx = 0, zz = 0;
    double left = 0;     // Σ of squares that the regression does not explain
    double freedom = 0;  // steps less what was fitted
  };

  explicit ProbeSeries(std::size_t steps) : signs_(steps), moved_(steps), seen_(steps) {}
  void clear() { size_ = 0; }
  bool full() const { return size_ == seen_.size(); }
  void add(double sign, double moved, double seen);
  /// The regression on the signs `late` steps ago, without a line. Absent with fewer than five steps.
  std::optional<Fit> fit(std::size_t late) const;
  void exchange(StateIo& io, const char* signs, const char* moved, const char* seen, const char* size,
                NumberRange range);

 private:
  std::vector<double> signs_, moved_, seen_;
  std::size_t size_ = 0;
};

/// The test moves of one layer's biases: half of the experts up, half down. The size is chosen so that eight decisions
/// give the gain a standard error of 0.08: 1.1 floors at 16 experts, .3 at 256.
class BiasProbe {
 public:
  BiasProbe(const ControllerConfig& config, int layer);

  /// Forgets the blocks before, and makes the next ones `size` times as large, 1/64 to 1.
  void begin(double size);
  /// Shapes the test moves of a block for these slopes. Returns whether the rate leaves room for one that tells.
  bool start_block(std::span<const double> slope, double mean_slope, double noise_sq);
  /// Test moves of six hundredths of the mean load, for whoever looks at the router's own scores.
  void start_marks(std::span<const double> slope, double mean_slope);
  /// Ends a block: adds it to those before if `clear`, else forgets them all. After a small one the next is eight times as
  /// large, at most of size 1. After one whose error is above 0.08, whatever caused it, it is larger by as much: up to four
  /// times that, and at most half of the mean load.
  void end_block(bool clear, double noise_sq);
  /// No test move in the next eight decisions.
  void pause();
  void leave();

  /// Keeps the sign in force beside the biases in force, at place `at` of the check's ring of delay + 3 steps.
  void remember(std::size_t at) { signs_[at] = sign_; }
  /// One step. Shares are Σ over experts of weight times slope, alone and times the biases. [N]
  struct Seen {
    std::span<const double> weight, slope, bias, load;
    double share, bias_share;
  };
  void observe(const Seen& seen, std::size_t at);
  /// The regression over this block and those before it, for an answer that is `late` steps late.
  std::optional<GainEstimate> answer(std::size_t late, double noise_sq) const;

  /// A decision was made: the next test move is in force. Returns whether a pause has ended.
  bool advance();
  bool paused() const { return decision_ < 0; }
  bool last_made() const { return decision_ >= static_cast<std::int64_t>(kProbeSigns.size()); }
  /// And the decision after the last one, which takes it back.
  bool all_made() const { return decision_ > static_cast<std::int64_t>(kProbeSigns.size()); }
  void stop() { decision_ = 0; }
  /// Counts the steps after the last test move, and the blocks.
  std::int64_t wait() { return ++waited_; }
  std::int64_t count_block() { return ++blocks_; }
  double size() const { return size_; }
  /// Adds the next test move.
  void add_to(std::span<double> wanted) const;
  /// The part of the biases in force that is a test move. [N], or empty without one.
  std::span<const double> offset() const {
    return sign_ != 0 ? std::span<const double>(offset_) : std::span<const double>();
  }

  void exchange(StateIo& io, NumberRange bias, NumberRange sum);

 private:
  void shape(double load, std::span<const double> slope, double mean_slope);
  GainSums block(std::size_t late, double noise_sq) const;
  double next_sign() const;

  std::size_t experts_;
  double rate_;
  std::int64_t decision_ = 0;  // of the block; negative: before it
  double sign_ = 0;
  std::vector<double> pattern_;
  std::int64_t waited_ = 0, blocks_ = 0;
  double size_ = 0;
  std::size_t code_;            // of the pattern
  std::vector<double> offset_;  // in force
  std::vector<double> signs_;   // those in force in the last steps
  ProbeSeries series_;
  double pattern_sq_ = 0, pattern_noise_ = 0;  // Σ q², and Σ q² times the relative load
  // Over the blocks before, one for each lateness; each block divided by its noise.
  std::array<GainSums, kProbeLags> sums_{};
};

}  // namespace moectl
