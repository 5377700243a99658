// What the tool prints may hold names, keys and paths of others: all of it goes through here.
#pragma once

#include <memory>
#include <ostream>

namespace moectl::cli {

/// While it lives, standard output and standard error show text as printable() makes it, line breaks kept. An escape in it
/// is one of JSON and of YAML as well: what a program reads there is the same.
class PrintableOutput {
 public:
  PrintableOutput();
  ~PrintableOutput();
  PrintableOutput(const PrintableOutput&) = delete;
  PrintableOutput& operator=(const PrintableOutput&) = delete;

 private:
  class Buffer;
  std::unique_ptr<Buffer> out_, err_;
};

/// Standard output for what holds no text of others, or is made safe already: a page, a screen's own control sequences.
std::ostream& untouched_output();

}  // namespace moectl::cli
