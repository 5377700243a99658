// Payload: one step's sums of all layers and the StepInfo, as one array of int64. A single all-reduce (SUM) turns the
// sums of this rank into the sums over all ranks.
#pragma once

#include <cstdint>
#include <exception>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/foreign.h"
#include "control/choice_check.h"
#include "moectl/controller.h"
#include "moectl/policy.h"
#include "moectl/state.h"

namespace moectl {

/// 64-bit FNV-1a, four lanes at a time for long arrays of doubles.
std::uint64_t hash_bytes(std::string_view bytes);
std::uint64_t hash_values(std::span<const double> values, std::uint64_t seed);

/// Of the experts and the mask; never 0.
std::uint64_t fingerprint_of(const RoutingBatch& batch);

/// Runs `body`; every exception becomes a ReductionError.
template <class Body>
void rethrow_as_reduction_error(Body&& body) {
  try {
    body();
  } catch (const ReductionError&) {
    throw;
  } catch (const std::exception& error) {
    throw ReductionError(std::string("reduction failed: ") + error.what());
  } catch (...) {
    throw ReductionError(std::string("reduction failed: ") + kNoMessage);
  }
}

/// Throws ReductionError unless all ranks hold the same lines "key: value"; it says the first that differs. One small
/// collective of fixed size, so that ranks whose payloads differ in size find out before they hang in the large one;
/// where lines differ, a few more of the same size.
void check_same_everywhere(const Reduction& reduction, std::span<const std::string> lines);

class Payload {
 public:
  /// One array of sums a layer, of these sizes; then the magnitude of each; then what was seen of its wiring; then the
  /// words of StepInfo.
  Payload(std::span<const std::size_t> sizes, std::size_t domains);

  std::span<std::int64_t> layer(std::size_t i) {
    return {sums_.data() + begins_[i], begins_[i + 1] - begins_[i]};
  }
  /// Writes this rank's sums of layer i, and how large they are.
  void put(std::size_t i, std::span<const std::int64_t> sums);
  /// Whether the sum over ranks of layer i is surely in range: none of its sums can have wrapped around.
  bool in_range(std::size_t i) const;
  /// Writes what this rank saw of the wiring of layer i.
  void put_wiring(std::size_t i, WiringSeen seen) {
    sums_[begins_.back() + layers() + i] = seen == WiringSeen::kOther     ? 1
                                           : seen == WiringSeen::kNoOther ? kMoreThanRanks
                                           : seen == WiringSeen::kOwn     ? kMoreThanRanks * kMoreThanRanks
                                                                          : 0;
  }
  /// What all ranks saw.
  WiringSeen wiring(std::size_t i) const {
    const std::int64_t sum = sums_[begins_.back() + layers() + i];
    return sum % kMoreThanRanks != 0                    ? WiringSeen::kOther
           : sum / kMoreThanRanks % kMoreThanRanks != 0 ? WiringSeen::kNoOther
           : sum != 0                                   ? WiringSeen::kOwn
                                                        : WiringSeen::kNothing;
  }
  /// Writes this rank's part of everything else. `failed`: a policy of this rank threw in its last decision. `held`: by
  /// the host.
  void put(const StepInfo& info, std::uint64_t actuation, bool failed, bool held);
  /// Ranks that are held by their hosts, of all.
  std::int64_t held() const { return word(kHeld); }
  std::int64_t ranks() const { return word(kRanks); }
  /// Sums over ranks, then checks. Throws ReductionError.
  void reduce(const Reduction& reduction);
  /// After the sum over ranks: throws ReductionError unless all ranks applied the same values, or some failed.
  void check() const;
  /// After the sum over ranks: ranks differ because policies of some of them failed.
  bool some_failed() const { return word(kFailed) > 0 && !same_values(); }
  /// Writes or reads it; as zeros if it does not count. Throws StateError if it was read, counts, and would not pass
  /// check().
  void exchange(StateIo& io, std::string_view name, bool counts);
  /// The same of one layer's sums and of all that is not of a layer.
  void exchange_layer(StateIo& io, std::size_t layer, bool counts);
  std::span<std::int64_t> all() { return sums_; }
  std::span<const std::int64_t> all() const { return sums_; }
  /// The StepInfo over all ranks; `mixture` [domains] is the storage of next_mixture.
  StepInfo info(std::span<std::int64_t> mixture) const;

 private:
  enum Word : std::size_t {
    kRanks,
    kLossSum,
    kLossCount,
    kLossBad,
    kGradientSum,
    kGradientCount,
    kGradientBad,
    kSkipped,
    kMixtures,
    kHash,
    kHashSquare,
    kFailed,
    kHeld,
    kWordCount
  };
  static constexpr std::int64_t kMoreThanRanks = std::int64_t{1} << 21;
  std::int64_t& word(Word which) { return sums_[sums_.size() - domains_ - kWordCount + which]; }
  std::int64_t word(Word which) const { return sums_[sums_.size() - domains_ - kWordCount + which]; }

  bool ranks_known() const;
  bool same_values() const;

  std::size_t layers() const { return begins_.size() - 1; }
  std::span<std::int64_t> magnitudes() { return std::span(sums_).subspan(begins_.back(), layers()); }

  std::vector<std::size_t> begins_;  // of each layer's sums, and the end of the last one's
  std::size_t domains_;
  std::vector<std::int64_t> sums_;
};

}  // namespace moectl
