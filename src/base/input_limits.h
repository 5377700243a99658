// What an input may ask for. Each limit is checked before memory is taken for the input, and the message names the place,
// the value and the limit. docs/security.md lists them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moectl {

/// Bytes of a line of JSON or CSV: 4096 experts with every optional array and 20 characters a number take under 2 MB.
inline constexpr std::size_t kLongestLine = std::size_t{1} << 25;
/// Levels of YAML and JSON. Configs and records are a few levels deep; libyaml's time grows with the square of the depth.
inline constexpr std::size_t kMostLevels = 64;
/// Bytes of a config: lists of one number an expert are the longest that one holds.
inline constexpr std::size_t kLargestConfig = std::size_t{1} << 24;
/// Bytes of a key or a word of a config, and of a name in a log.
inline constexpr std::size_t kLongestWord = 4096;
/// Values, lists and maps of a config, each as often as aliases repeat it.
inline constexpr std::size_t kMostNodes = std::size_t{1} << 20;
/// Groups of layers of a config, times the spans of its timeline (entries + 1): each has settings of its own.
inline constexpr std::int64_t kMostSettings = 4096;
/// Bytes of a file that is held as a whole: a saved state; biases as JSON, whose values take several times their text.
inline constexpr std::size_t kLargestState = std::size_t{1} << 32;
inline constexpr std::size_t kLargestJson = std::size_t{1} << 28;

/// Values of a file of biases as JSON: those of as many layers and experts as there may be, and their lists. Values of a
/// log's first line, or of a config in it: all that a config may have, with what is written in full.
inline constexpr std::int64_t kMostJsonValues = std::int64_t{1} << 23,
                              kMostLoggedValues = std::int64_t{1} << 21;
/// Bytes of all configs of a log.
inline constexpr std::size_t kMostConfigs = std::size_t{1} << 28;

/// Compressed input: bytes that it may inflate to in any case, and how many times its own size beyond them. JSON of
/// counts shrinks to a tenth, and to a hundredth where a layer has collapsed; gzip's own limit is a thousandth.
inline constexpr std::int64_t kFreelyInflated = std::int64_t{1} << 26;
inline constexpr std::int64_t kMostInflation = 200;
constexpr bool inflates_too_far(std::int64_t inflated, std::int64_t packed) {
  return inflated > kFreelyInflated && (inflated - kFreelyInflated) / kMostInflation > packed;
}

/// Experts of a layer, MoE layers (and tags of each in a log), and both together, of one model.
inline constexpr std::int64_t kMostExperts = 65536;
inline constexpr std::int64_t kMostLayers = 65536;
inline constexpr std::int64_t kMostLayersTimesExperts = std::int64_t{1} << 22;
/// Numbers in the sums of all layers of a controller, or of all layers and tags of a log, of which whoever reads it may
/// keep the sums: 1 GiB.
inline constexpr std::int64_t kMostNumbers = std::int64_t{1} << 27;
/// Numbers of eight bytes in the records that a reader holds: parts of a step, and what comes behind ranks that may be copies
/// of each other. 512 MiB.
inline constexpr std::int64_t kMostHeld = std::int64_t{1} << 26;
/// Different names of one kind (alerts, states of health) of a layer that an exporter keeps: each becomes a series that
/// stays. Further ones are left out.
inline constexpr std::size_t kMostNames = 64;
/// Columns of a line of CSV: one an expert of every layer, for several metrics.
inline constexpr std::size_t kMostColumns = std::size_t{1} << 20;
/// Pairs of experts that an import holds of one step.
inline constexpr std::int64_t kMostPairs = std::int64_t{1} << 23;
/// Pieces of a rotated log.
inline constexpr std::int64_t kMostPieces = 1'000'000'000;
/// Bytes of the header of a .npy array, numpy's own limit being 10 000, and of a safetensors file, where it is the format's
/// own limit; and of one event of TensorBoard.
inline constexpr std::size_t kLongestNpyHeader = std::size_t{1} << 16;
inline constexpr std::uint64_t kLongestSafetensorsHeader = 100'000'000;
inline constexpr std::uint64_t kLongestEvent = std::uint64_t{1} << 26;
/// Tokens of a forward pass in a dump of router logits: a mask takes a byte for each.
inline constexpr std::int64_t kMostTokensOfDump = std::int64_t{1} << 28;
/// Steps of the longest window, and of the longest delay.
inline constexpr int kLongestWindow = 10000;
inline constexpr int kLongestDelay = 1000;

/// Characters of a foreign value that a message repeats.
inline constexpr std::size_t kLongestShown = 60;

}  // namespace moectl
