// Event files: a row of TFRecords (length, its checksum, data, its checksum), each one Event message. Field numbers
// are those of tensorflow/core/util/event.proto and framework/summary.proto.
#include "moectl/tensorboard.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "base/input_limits.h"
#include "base/printable.h"
#include "export/step_sample.h"
#include "measure/percentiles.h"
#include "moectl/figures.h"
#include "moectl/health.h"

namespace moectl {
namespace {

/// Table of the reflected Castagnoli polynomial.
constexpr std::array<std::uint32_t, 256> kCrcTable = [] {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82F63B78U : 0);
    table[i] = crc;
  }
  return table;
}();

/// Appends protobuf fields to a buffer that keeps its memory.
class Wire {
 public:
  void varint(std::uint64_t v) {
    for (; v >= 0x80; v >>= 7) bytes_.push_back(static_cast<char>(v | 0x80));
    bytes_.push_back(static_cast<char>(v));
  }
  void integer(int field, std::int64_t v) {
    varint(static_cast<std::uint64_t>(field) << 3);
    varint(static_cast<std::uint64_t>(v));
  }
  void real(int field, double v) {
    varint(static_cast<std::uint64_t>(field) << 3 | 1);
    fixed(std::bit_cast<std::uint64_t>(v));
  }
  void real(int field, float v) {
    varint(static_cast<std::uint64_t>(field) << 3 | 5);
    fixed(std::bit_cast<std::uint32_t>(v));
  }
  /// A string or a message.
  void bytes(int field, std::string_view v) {
    varint(static_cast<std::uint64_t>(field) << 3 | 2);
    varint(v.size());
    bytes_.append(v);
  }
  void packed(int field, std::span<const double> values) {
    varint(static_cast<std::uint64_t>(field) << 3 | 2);
    varint(values.size() * sizeof(double));
    for (const double v : values) fixed(std::bit_cast<std::uint64_t>(v));
  }
  /// Little-endian, whatever the machine is.
  template <typename T>
  void fixed(T v) {
    for (std::size_t i = 0; i < sizeof v; ++i) bytes_.push_back(static_cast<char>(v >> (8 * i)));
  }
  void clear() { bytes_.clear(); }
  std::string_view view() const { return bytes_; }

 private:
  std::string bytes_;
};

namespace event {
constexpr int kWallTime = 1, kStep = 2, kFileVersion = 3, kSummary = 5, kSessionLog = 7;
}
namespace summary {
constexpr int kValue = 1, kTag = 1, kSimpleValue = 2, kHistogram = 5;
}
namespace histogram {
constexpr int kMin = 1, kMax = 2, kNum = 3, kSum = 4, kSumSquares = 5, kLimits = 6, kCounts = 7;
}
constexpr std::size_t kBuckets = 30;  // as many as TensorBoard shows

/// The n-th file of a run: TensorBoard reads those of a directory in the order of their names.
std::filesystem::path event_file(const std::filesystem::path& directory, int n) {
  char name[64];
  std::snprintf(name, sizeof name, "events.out.tfevents.%010d.moectl", n);
  return directory / std::string(name);
}

/// How many layers have each of some things in one step: names stay once met, so that a curve comes down again. Of a log,
/// whose names are its own, the first kMostNames.
class Tally {
 public:
  explicit Tally(std::string prefix) : prefix_(std::move(prefix)) {}
  void add(std::string_view name) {
    const auto it = counts_.find(name);
    if (it != counts_.end()) {
      ++it->second.count;
    } else if (counts_.size() < kMostNames) {
      counts_.emplace(name, Entry{prefix_ + std::string(name), 1});
    }
  }
  template <typename Visit>
  void take(Visit visit) {
    for (auto& [name, entry] : counts_) visit(entry.tag, std::exchange(entry.count, 0));
  }

 private:
  struct Entry {
    std::string tag;
    int count = 0;
  };
  std::string prefix_;
  std::map<std::string, Entry, std::less<>> counts_;
};

}  // namespace

std::uint32_t masked_crc32c(const void* data, std::size_t size) {
  std::uint32_t crc = ~0U;
  for (const auto* byte = static_cast<const unsigned char*>(data); size > 0; ++byte, --size) {
    crc = (crc >> 8) ^ kCrcTable[(crc ^ *byte) & 0xFF];
  }
  crc = ~crc;
  return std::rotr(crc, 15) + 0xA282EAD8U;
}

constexpr std::pair<std::string_view, double> kOverLayers[] = {{"balance/max_vio_p5", 0.05},
                                                               {"balance/max_vio_p25", 0.25},
                                                               {"balance/max_vio_p50", 0.5},
                                                               {"balance/max_vio_p75", 0.75},
                                                               {"balance/max_vio_p95", 0.95}};

class TensorBoardWriter::File {
 public:
  File(const std::string& directory, TensorBoardOptions options) : options_(std::move(options)) {
    if (options_.histogram_every < 0) {
      throw std::invalid_argument("histogram_every: " + std::to_string(options_.histogram_every) +
                                  ": must be at least 0");
    }
    for (const std::string& name : options_.metrics) {
      const MetricField* field = find_metric(name);
      if (!field) throw std::invalid_argument("metrics: " + name + ": is no metric");
      fields_.push_back(field);
    }
    std::error_code failed;
    std::filesystem::create_directories(directory, failed);
    int n = 0;
    while (std::filesystem::exists(event_file(directory, n), failed)) ++n;
    second_ = n > 0;
    name_ = event_file(directory, n).string();
    errno = 0;
    file_ = std::fopen(name_.c_str(), "wbx");
    if (!file_) {
      give_up();
      return;
    }
    Wire first;
    first.real(event::kWallTime, options_.wall_time ? options_.wall_time(0) : 0.0);
    first.bytes(event::kFileVersion, "brain.Event:2");
    put(first.view());
  }
  ~File() {
    flush();
    if (file_) std::fclose(file_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  void add(const StepSample& sample) {
    if (step_ && *step_ != sample.step) end_step();
    if (!step_) begin_step(sample.step);
    mean_->add(sample);
    const Tags& tags = tags_of(sample.layer);
    if (sample.metrics) {
      if (sample.metrics->max_vio) max_vios_.push_back(*sample.metrics->max_vio);
      for (std::size_t i = 0; i < fields_.size(); ++i)
        scalar(tags.metrics[i], sample.metrics->*fields_[i]->value);
    }
    if (!sample.health.empty()) health_.add(sample.health);
    for (std::size_t a = 0; a < kActuatorCount; ++a) {
      const Responsiveness& found = sample.actuators[a].responsiveness;
      if (found.state != Response::kNotApplicable) responses_[a].add(name_of(found.state));
      scalar(tags.gains[a], found.gain);
    }
    for (const std::string_view alert : sample.alerts) alerts_.add(alert);
    for (const Actuator which : kActuators) {
      const auto a = static_cast<std::size_t>(which);
      const ActuatorSample& actuator = sample.actuators[a];
      if (!actuator.min) continue;
      for (int r = 0; r < kReasonCount; ++r) {
        if (actuator.reasons.has(static_cast<Reason>(r))) reasons_[a].add(name_of(static_cast<Reason>(r)));
      }
      if (which != Actuator::kExpertBias) {
        scalar(tags.actuators[a], actuator.max);
      } else if (with_histograms()) {
        values_.assign(actuator.applied.begin(), actuator.applied.end());
        histogram(tags.actuators[a]);
      }
    }
    if (sample.stats && with_histograms()) {
      relative_loads(sample.stats->counts(), sample.targets, values_);
      histogram(tags.load);
    }
  }
  /// A loss that stands apart from the training steps.
  void add_loss(const std::string& tag, std::int64_t step, double loss) {
    // Each layer's record carries it.
    if (std::exchange(last_loss_, {tag, step}) == std::pair(tag, step)) return;
    end_step();
    begin_step(step);
    scalar("loss/" + tag, loss);
    put_event();
  }

  void flush() {
    end_step();
    errno = 0;
    if (file_ && std::fflush(file_) != 0) give_up();
  }
  bool ok() const { return good_; }

  std::vector<std::string_view> alerts_of_record;  // scratch space

 private:
  /// The tags of one layer, made once.
  struct Tags {
    std::vector<std::string> metrics;
    std::string actuators[kActuatorCount], gains[kActuatorCount], load;
  };

  const Tags& tags_of(int layer) {
    const auto it = tags_.find(layer);
    if (it != tags_.end()) return it->second;
    const std::string of = layer < 0 ? "/model" : "/layer_" + std::to_string(layer);
    Tags tags;
    for (const MetricField* field : fields_) tags.metrics.push_back(std::string(field->name) + of);
    for (const Actuator which : kActuators) {
      const auto a = static_cast<std::size_t>(which);
      tags.actuators[a] = std::string(name_of(which)) + of;
      tags.gains[a] =
          (which == Actuator::kExpertBias ? "" : std::string(name_of(which)) + '_') + "response_gain" + of;
    }
    tags.load = "load" + of;
    return tags_.emplace(layer, std::move(tags)).first->second;
  }

  bool with_histograms() const {
    return options_.histogram_every > 0 && *step_ % options_.histogram_every == 0;
  }

  void begin_step(std::int64_t step) {
    step_ = step;
    mean_.emplace(step);
    summary_.clear();
    if (std::exchange(second_, false)) {
      // What the file before this one says of this step on was lost or is repeated: a session starts.
      Wire session, start;
      session.integer(1, 1);
      start.real(event::kWallTime, wall_time());
      start.integer(event::kStep, step);
      start.bytes(event::kSessionLog, session.view());
      put(start.view());
    }
  }

  void end_step() {
    if (!step_) return;
    const StepFigures figures = mean_->figures();
    scalar("loss", figures.loss);
    scalar("balance/max_vio", figures.max_vio);
    scalar("balance/max_vio_floor", figures.floor_max_vio);
    if (max_vios_.size() > 1) {
      Percentiles over_layers(max_vios_);
      for (const auto& [tag, share] : kOverLayers) scalar(tag, over_layers.next(share));
    }
    max_vios_.clear();
    scalar("balance/cv", figures.cv);
    scalar("balance/cv_floor", figures.floor_cv);
    if (figures.max_vio) scalar("balance/dead_experts", figures.dead_experts);
    scalar("balance/limit_hits", static_cast<double>(figures.limit_hits));
    const auto put_count = [&](const std::string& tag, int count) {
      scalar(tag, static_cast<double>(count));
    };
    health_.take(put_count);
    alerts_.take(put_count);
    for (Tally& tally : responses_) tally.take(put_count);
    for (Tally& tally : reasons_) tally.take(put_count);
    put_event();
  }

  void put_event() {
    event_.clear();
    event_.real(event::kWallTime, wall_time());
    event_.integer(event::kStep, *step_);
    event_.bytes(event::kSummary, summary_.view());
    put(event_.view());
    step_.reset();
  }

  double wall_time() const {
    return options_.wall_time ? options_.wall_time(*step_) : static_cast<double>(*step_);
  }

  void scalar(std::string_view tag, const std::optional<double>& value) {
    if (!value || !std::isfinite(*value)) return;
    value_.clear();
    value_.bytes(summary::kTag, tag);
    value_.real(summary::kSimpleValue, static_cast<float>(*value));
    summary_.bytes(summary::kValue, value_.view());
  }

  /// Of values_, in buckets of equal width. A bucket holds what is above the limit before it and not above its own.
  void histogram(std::string_view tag) {
    std::erase_if(values_, [](double v) { return !std::isfinite(v); });
    if (values_.empty()) return;
    const auto [low, high] = std::minmax_element(values_.begin(), values_.end());
    const double min = *low, max = *high, width = (max - min) / static_cast<double>(kBuckets);
    double sum = 0, squares = 0;
    const std::size_t buckets = width > 0 ? kBuckets : 1;
    std::array<double, kBuckets> limits{}, counts{};
    for (std::size_t b = 0; b < buckets; ++b) limits[b] = min + width * static_cast<double>(b + 1);
    limits[buckets - 1] = max;
    for (const double v : values_) {
      sum += v;
      squares += v * v;
      ++counts[static_cast<std::size_t>(std::lower_bound(limits.begin(), limits.begin() + buckets, v) -
                                        limits.begin())];
    }
    histogram_.clear();
    histogram_.real(histogram::kMin, min);
    histogram_.real(histogram::kMax, max);
    histogram_.real(histogram::kNum, static_cast<double>(values_.size()));
    histogram_.real(histogram::kSum, sum);
    histogram_.real(histogram::kSumSquares, squares);
    histogram_.packed(histogram::kLimits, std::span(limits).first(buckets));
    histogram_.packed(histogram::kCounts, std::span(counts).first(buckets));
    value_.clear();
    value_.bytes(summary::kTag, tag);
    value_.bytes(summary::kHistogram, histogram_.view());
    summary_.bytes(summary::kValue, value_.view());
  }

  void put(std::string_view data) {
    if (!file_) return;
    record_.clear();
    record_.fixed(static_cast<std::uint64_t>(data.size()));
    record_.fixed(masked_crc32c(record_.view().data(), 8));
    const std::uint32_t crc = masked_crc32c(data.data(), data.size());
    errno = 0;
    const auto write = [&](std::string_view bytes) {
      return std::fwrite(bytes.data(), 1, bytes.size(), file_) == bytes.size();
    };
    bool wrote = write(record_.view()) && write(data);
    record_.clear();
    record_.fixed(crc);
    wrote = wrote && write(record_.view());
    if (!wrote) give_up();
  }

  /// Training goes on without it; that is said once.
  void give_up() {
    const int why = errno ? errno : EIO;
    if (!std::exchange(good_, false)) return;
    if (file_) std::fclose(std::exchange(file_, nullptr));
    std::fprintf(stderr, "moectl: %s: event file cannot be written (%s); going on without it\n",
                 message_line(name_).c_str(), std::strerror(why));
  }

  TensorBoardOptions options_;
  std::vector<const MetricField*> fields_;
  std::string name_;
  std::FILE* file_ = nullptr;
  bool good_ = true, second_ = false;
  std::map<int, Tags> tags_;
  std::optional<std::int64_t> step_;
  std::optional<LayerMean> mean_;
  std::pair<std::string, std::int64_t> last_loss_;
  Tally health_{"health/"}, alerts_{"alerts/"};
  Tally responses_[kActuatorCount] = {Tally("response/"), Tally("aux_loss_weight_response/"),
                                      Tally("router_temperature_response/")};
  Tally reasons_[kActuatorCount] = {Tally("reasons/expert_bias_"), Tally("reasons/aux_loss_weight_"),
                                    Tally("reasons/router_temperature_")};
  std::vector<double> max_vios_;  // of the step's layers
  std::vector<double> values_;
  Wire record_, event_, summary_, value_, histogram_;
};

TensorBoardWriter::TensorBoardWriter(const std::string& directory, TensorBoardOptions options)
    : file_(std::make_unique<File>(directory, std::move(options))) {}
TensorBoardWriter::~TensorBoardWriter() = default;

void TensorBoardWriter::write(const StepReport& report) {
  if (!file_->ok()) return;
  for (const LayerReport& layer : report.layers) file_->add(sample_of(report, &layer));
  if (has_model_actuators(report)) file_->add(sample_of(report, nullptr));
  file_->flush();
}

void TensorBoardWriter::write(const LogRecord& record, const Metrics& metrics) {
  if (!file_->ok()) return;
  if (record.tag == "train") {
    file_->add(sample_of(record, metrics, &file_->alerts_of_record));
  } else if (record.loss) {
    file_->add_loss(record.tag, record.step, *record.loss);
  }
}

void TensorBoardWriter::flush() {
  file_->flush();
}
bool TensorBoardWriter::ok() const {
  return file_->ok();
}

}  // namespace moectl
