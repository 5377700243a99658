#include "import/import.h"

#include <algorithm>

#include "fuzz/choices.h"
#include "fuzz/memory_file.h"
#include "import/biases.h"

namespace moectl::fuzz {

void importers(Bytes bytes) {
  Choices choices(bytes);
  const auto& formats = import_formats();
  const std::size_t format = choices.below(formats.size() + 1);
  ImportOptions options;
  options.top_k = choices.one_of({1, 2, 0, 8});
  options.experts = choices.one_of({0, 4, 0, 64});
  options.tokens = choices.one_of<std::int64_t>({0, 64, 1 << 20});
  options.tokens_per_step = choices.one_of<std::int64_t>({1, 4, 1024});
  options.sequence_length = choices.one_of<std::int64_t>({0, 2});
  options.values = choices.one_of({"auto", "counts", "share", "percent", "ratio"});
  options.scores = choices.one_of({"softmax", "sigmoid"});
  const std::uint8_t more = choices.byte();
  options.pairs = more & 1;
  options.by_rank = more & 2;
  options.by_micro_batch = more & 4;
  const Bytes rest = choices.rest();
  const std::size_t of_mask = std::min<std::size_t>(16 * (more >> 4), rest.size());
  const MemoryFile mask(rest.first(of_mask)), file(rest.subspan(of_mask));
  if (of_mask > 0) options.mask = mask.path();
  try {
    if (format < formats.size()) {
      import_trace(formats[format].name, {file.path()}, "/dev/null", options);
    } else {
      for (const auto& [layer, biases] : biases_in(file.path(), {})) require(layer >= 0, "layers are from 0");
    }
  } catch (const ImportError& error) {
    require_message(error);
  }
}

}  // namespace moectl::fuzz
