#include "log/json.h"

#include <nlohmann/json.hpp>

#include "fuzz/choices.h"
#include "fuzz/memory_file.h"
#include "log/log_record.h"

namespace moectl::fuzz {

void json(Bytes bytes) {
  const std::string text = text_of(bytes);
  std::string padded = text + std::string(JsonParser::kPadding, ' ');
  JsonParser parser;
  try {
    parser.parse(std::string_view(padded).substr(0, text.size()));
  } catch (const JsonError&) {
    return;
  }
  require(nlohmann::json::accept(text), "what is accepted is JSON");
  if (!parser.value().is_object()) return;
  const std::string name = "t.jsonl";
  const LogLine line{name, 1, parser.value()};
  LogHeader header;
  try {
    header = read_header(line);
  } catch (const LogError& error) {
    require_message(error);
  }
  for (const bool is_run : {false, true}) {
    header.is_run = is_run;
    try {
      Assumptions assumptions;
      if (is_config_change(line, header)) read_config_change(line);
      const LogRecord record =
          read_record(line, header, groups_of(header), {.top_k = 1, .tokens = 64}, assumptions);
      require(record.stats.experts() == 0 || record.stats.valid(), "the sums of a record are valid");
    } catch (const LogError& error) {
      require_message(error);
    }
  }
}

}  // namespace moectl::fuzz
