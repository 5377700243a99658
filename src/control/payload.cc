#include "control/payload.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include "moectl/stats.h"

namespace moectl {
namespace {

constexpr std::uint64_t kFnvOffset = 0xcbf29ce484222325ULL;
constexpr std::uint64_t kFnvPrime = 0x100000001b3ULL;
// What a magnitude leaves out, so that those of 2^20 ranks add up below 2^63.
constexpr int kMagnitudeBits = 20;
constexpr std::int64_t kMostRanks = std::int64_t{1} << kMagnitudeBits;
constexpr int kHashBits = 20;  // so that R ranks' squares add up far below 2^63

std::uint64_t mix(std::uint64_t hash, std::uint64_t word) {
  hash = (hash ^ word) * kFnvPrime;
  return hash ^ (hash >> 29);
}

std::int64_t fold(std::uint64_t hash) {
  return static_cast<std::int64_t>((hash ^ (hash >> kHashBits) ^ (hash >> (2 * kHashBits))) &
                                   ((1U << kHashBits) - 1));
}

// Equal on all R ranks if and only if R Σh² = (Σh)² (Cauchy and Schwarz). Modulo 2^64, where equality still holds.
bool equal_everywhere(std::int64_t ranks, std::int64_t sum, std::int64_t square_sum) {
  return static_cast<std::uint64_t>(ranks) * static_cast<std::uint64_t>(square_sum) ==
         static_cast<std::uint64_t>(sum) * static_cast<std::uint64_t>(sum);
}

bool is_same_everywhere(const Reduction& reduction, std::uint64_t hash) {
  std::array<std::int64_t, 7> words{1};
  for (std::size_t part = 0; part < 3; ++part) {
    const auto h = static_cast<std::int64_t>((hash >> (kHashBits * part)) & ((1U << kHashBits) - 1));
    words[1 + 2 * part] = h;
    words[2 + 2 * part] = h * h;
  }
  rethrow_as_reduction_error([&] { reduction(words); });
  for (std::size_t part = 0; part < 3; ++part) {
    if (!equal_everywhere(words[0], words[1 + 2 * part], words[2 + 2 * part])) return false;
  }
  return true;
}

}  // namespace

std::uint64_t hash_bytes(std::string_view bytes) {
  std::uint64_t hash = kFnvOffset;
  for (const char c : bytes) hash = mix(hash, static_cast<unsigned char>(c));
  return hash;
}

std::uint64_t hash_values(std::span<const double> values, std::uint64_t seed) {
  std::array<std::uint64_t, 4> lanes = {seed, seed + 1, seed + 2, seed + 3};
  std::size_t i = 0;
  for (; i + 4 <= values.size(); i += 4) {
    for (std::size_t lane = 0; lane < 4; ++lane) {
      lanes[lane] = mix(lanes[lane], std::bit_cast<std::uint64_t>(values[i + lane]));
    }
  }
  for (; i < values.size(); ++i) lanes[0] = mix(lanes[0], std::bit_cast<std::uint64_t>(values[i]));
  return mix(mix(mix(lanes[0], lanes[1]), lanes[2]), lanes[3]);
}

std::uint64_t fingerprint_of(const RoutingBatch& batch) {
  std::array<std::uint64_t, 4> lanes = {kFnvOffset, 1, 2, 3};
  const auto add = [&](const auto& values) {
    std::size_t i = 0;
    for (; i + 4 <= values.size(); i += 4) {
      for (std::size_t lane = 0; lane < 4; ++lane) {
        lanes[lane] = mix(lanes[lane], static_cast<std::uint64_t>(values[i + lane]));
      }
    }
    for (; i < values.size(); ++i) lanes[0] = mix(lanes[0], static_cast<std::uint64_t>(values[i]));
    lanes[0] = mix(lanes[0], values.size());
  };
  add(batch.experts);
  add(batch.mask);
  return mix(mix(mix(lanes[0], lanes[1]), lanes[2]), lanes[3]) | 1;
}

void check_same_everywhere(const Reduction& reduction, std::span<const std::string> lines) {
  const auto first_agree = [&](std::size_t count) {
    std::string text;
    for (const std::string& line : lines.first(std::min(count, lines.size()))) text += line + '\n';
    return is_same_everywhere(reduction, hash_bytes(text));
  };
  constexpr std::size_t kMostLines = std::size_t{1} << 30;
  if (first_agree(kMostLines)) return;
  // Every rank sees the same answers, so all of them search in step.
  std::size_t same = 0;
  for (std::size_t more = kMostLines / 2; more > 0; more /= 2) {
    if (first_agree(same + more)) same += more;
  }
  throw ReductionError("ranks disagree on the config: this rank has " +
                       (same < lines.size() ? '"' + lines[same] + "\", another rank another value"
                                            : "fewer keys than another rank"));
}

namespace {

std::int64_t magnitude_of(std::span<const std::int64_t> sums) {
  std::uint64_t bits = 0;  // no magnitude is above the bits that all of them set
  for (const std::int64_t sum : sums) bits |= static_cast<std::uint64_t>(sum ^ (sum >> 63));
  return static_cast<std::int64_t>(bits >> kMagnitudeBits);
}

}  // namespace

Payload::Payload(std::span<const std::size_t> sizes, std::size_t domains) : begins_{0}, domains_(domains) {
  for (const std::size_t size : sizes) begins_.push_back(begins_.back() + size);
  sums_.assign(begins_.back() + 2 * layers() + kWordCount + domains, 0);
}

void Payload::put(std::size_t i, std::span<const std::int64_t> sums) {
  std::copy(sums.begin(), sums.end(), layer(i).begin());
  magnitudes()[i] = magnitude_of(sums);
}

bool Payload::in_range(std::size_t i) const {
  const std::int64_t magnitude = sums_[begins_.back() + i];
  // Each rank left out less than one unit.
  return magnitude >= 0 && magnitude <= (std::int64_t{1} << (62 - kMagnitudeBits)) - word(kRanks);
}

void Payload::put(const StepInfo& info, std::uint64_t actuation, bool failed, bool held) {
  std::fill(sums_.end() - static_cast<std::ptrdiff_t>(domains_ + kWordCount), sums_.end(), 0);
  word(kRanks) = 1;
  const auto put_number = [this](std::optional<double> value, Word sum, Word count, Word bad) {
    if (!value) return;
    const bool usable = fits_fixed(*value);
    word(sum) = usable ? to_fixed(*value) : 0;
    word(count) = usable ? 1 : 0;
    word(bad) = usable ? 0 : 1;
  };
  put_number(info.loss, kLossSum, kLossCount, kLossBad);
  put_number(info.gradient_norm, kGradientSum, kGradientCount, kGradientBad);
  word(kSkipped) = info.skipped ? 1 : 0;
  if (!info.next_mixture.empty() && std::all_of(info.next_mixture.begin(), info.next_mixture.end(),
                                                [](std::int64_t n) { return n >= 0; })) {
    word(kMixtures) = 1;
    std::copy(info.next_mixture.begin(), info.next_mixture.end(),
              sums_.end() - static_cast<std::ptrdiff_t>(domains_));
  }
  const std::int64_t h = fold(actuation);
  word(kHash) = h;
  word(kHashSquare) = h * h;
  word(kFailed) = failed ? 1 : 0;
  word(kHeld) = held ? 1 : 0;
}

void Payload::reduce(const Reduction& reduction) {
  rethrow_as_reduction_error([&] { reduction(sums_); });
  check();
}

bool Payload::ranks_known() const {
  return word(kRanks) >= 1 && word(kRanks) <= kMostRanks;
}

bool Payload::same_values() const {
  return equal_everywhere(word(kRanks), word(kHash), word(kHashSquare));
}

void Payload::check() const {
  if (word(kRanks) < 1) throw ReductionError("reduction returned a sum over no ranks");
  if (word(kRanks) > kMostRanks) {
    throw ReductionError("reduction returned a sum over " + std::to_string(word(kRanks)) +
                         " ranks: must be at most " + std::to_string(kMostRanks));
  }
  if (!same_values() && !some_failed()) {
    throw ReductionError("ranks have applied different values: one of them has diverged");
  }
}

void Payload::exchange(StateIo& io, std::string_view name, bool counts) {
  if (!counts) std::fill(sums_.begin(), sums_.end(), 0);
  // Magnitudes are formed anew: sums that were formed on a device have none yet, and the state is the same.
  std::vector<std::int64_t> saved = sums_;
  std::fill_n(saved.begin() + static_cast<std::ptrdiff_t>(begins_.back()), layers(), 0);
  io.values(name, saved, StateIo::kAnyInteger);
  if (io.reads()) {
    sums_ = saved;
    for (std::size_t i = 0; i < layers(); ++i) magnitudes()[i] = magnitude_of(layer(i));
  }
  io.check(!counts || (ranks_known() && (same_values() || some_failed())), name,
           "be a sum over ranks that agree");
}

void Payload::exchange_layer(StateIo& io, std::size_t i, bool counts) {
  std::vector<std::int64_t> sums(layer(i).begin(), layer(i).end());
  std::vector<std::int64_t> words(sums_.end() - static_cast<std::ptrdiff_t>(kWordCount + domains_),
                                  sums_.end());
  if (!counts) {
    std::fill(sums.begin(), sums.end(), 0);
    std::fill(words.begin(), words.end(), 0);
  }
  io.values("sums", sums, StateIo::kAnyInteger);
  io.values("words", words, StateIo::kAnyInteger);
  if (!io.reads() || !counts) return;
  put(i, sums);
  std::copy(words.begin(), words.end(), sums_.end() - static_cast<std::ptrdiff_t>(kWordCount + domains_));
  io.check(ranks_known() && (same_values() || some_failed()), "words", "be a sum over ranks that agree");
}

StepInfo Payload::info(std::span<std::int64_t> mixture) const {
  StepInfo info;
  const auto mean = [this](Word sum, Word count, Word bad) -> std::optional<double> {
    if (word(count) < 1 || word(bad) != 0) return std::nullopt;
    return from_fixed(word(sum)) / static_cast<double>(word(count));
  };
  info.loss = mean(kLossSum, kLossCount, kLossBad);
  info.gradient_norm = mean(kGradientSum, kGradientCount, kGradientBad);
  info.skipped = word(kSkipped) != 0;
  if (word(kMixtures) == word(kRanks)) {  // known only if every rank gave its mixture
    const auto begin = sums_.end() - static_cast<std::ptrdiff_t>(domains_);
    if (std::all_of(begin, sums_.end(), [](std::int64_t n) { return n >= 0; })) {
      std::copy(begin, sums_.end(), mixture.begin());
      info.next_mixture = mixture;
    }
  }
  return info;
}

}  // namespace moectl
