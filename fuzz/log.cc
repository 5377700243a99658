#include "export/run_figures.h"
#include "fuzz/choices.h"
#include "fuzz/memory_file.h"
#include "moectl/run_log.h"

namespace moectl::fuzz {

void log(Bytes bytes) {
  Choices choices(bytes);
  const auto policy = choices.one_of({FaultPolicy::kSalvage, FaultPolicy::kRepair, FaultPolicy::kStrict});
  const MemoryFile file(choices.rest());
  try {
    LogReader reader(file.path(), policy);
    RecordMetrics metrics;
    while (const auto record = reader.next()) {
      require(record->step >= 0 && record->layer >= -1, "records have a step and a layer");
      require(record->stats.experts() == 0 || record->stats.valid(), "the sums of a record are valid");
      metrics.of(*record);
    }
    require(policy != FaultPolicy::kStrict || reader.fault_count() == 0,
            "a strict reader passes over nothing");
  } catch (const LogError& error) {
    require_message(error);
  }
}

}  // namespace moectl::fuzz
