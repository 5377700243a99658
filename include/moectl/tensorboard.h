// TensorBoard event files, written by a running controller or from a log.
//
//   moectl::TensorBoardWriter board("runs/board/mine");
//   controller.set_log([&](const moectl::StepReport& report) { board.write(report); });
//
// `moectl tensorboard` writes the same files from run logs.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "moectl/controller.h"
#include "moectl/run_log.h"

namespace moectl {

struct TensorBoardOptions {
  std::int64_t histogram_every = 10;  ///< Steps between histograms of loads and biases; 0: none.
  /// Metrics written for each layer, of metric_fields().
  std::vector<std::string> metrics = {"max_vio",      "load_cv",   "entropy_normalized", "max_load",
                                      "dead_experts", "drop_rate", "straggler_slowdown"};
  /// Seconds since the epoch for a step. By default the step's number, so that the same run gives the same bytes.
  std::function<double(std::int64_t step)> wall_time{};
};

/// Scalars: `loss`; `balance/…`, means over layers beside their floors, and of several layers percentiles of MaxVio over
/// them (`balance/max_vio_p5` … `_p95`); `METRIC/layer_L`; `aux_loss_weight/layer_L` and `router_temperature/layer_L`
/// (`…/model` where all layers share one); `reasons/ACTUATOR_REASON`, `alerts/NAME`, `health/STATE` and `response/STATE`,
/// the number of layers; `response_gain/layer_L`. Histograms: `load/layer_L` (over the mean load) and
/// `expert_bias/layer_L`.
///
/// The wire format is written directly. Three fixed messages do not need a protobuf library, and two protobuf libraries
/// in one process conflict (LibTorch contains one). After the first steps, only a name that is met for the first
/// time allocates.
class TensorBoardWriter {
 public:
  /// Opens a new file `events.out.tfevents.N.moectl` in the directory, which is made if it is not there; a second
  /// writer continues the first one's run. Throws std::invalid_argument on options; a directory that cannot be
  /// written, now or later, is reported once on standard error and never stops training.
  explicit TensorBoardWriter(const std::string& directory, TensorBoardOptions options = {});
  ~TensorBoardWriter();
  void write(const StepReport& report);
  /// Adds one record of a log, in order. A step is written when the next step begins, or at flush(). Of records with a
  /// tag other than `train`, only the loss is written, as `loss/TAG`. `metrics`: those of the record.
  void write(const LogRecord& record, const Metrics& metrics);
  void flush();
  /// False after a write failed.
  bool ok() const;

 private:
  class File;
  std::unique_ptr<File> file_;
};

/// Checksum of TFRecord framing: CRC-32C (Castagnoli), rotated and offset. Exposed for readers.
std::uint32_t masked_crc32c(const void* data, std::size_t size);

}  // namespace moectl
