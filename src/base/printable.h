// Text of others, for people: the one place where it is made safe to print.
#pragma once

#include <string>
#include <string_view>

namespace moectl {

/// The text as a terminal may show it. What could move the cursor, change colours or reorder what is read (control
/// characters of ASCII and of C1, marks of direction, separators of lines) becomes an escape of JSON, as \u001b; a byte
/// that is not UTF-8 becomes '?'. With `keep_lines`, line breaks and tabs stay.
std::string printable(std::string_view text, bool keep_lines = false);

/// The same at the end of `out`, whose memory it uses.
void append_printable(std::string& out, std::string_view text, bool keep_lines = false);

/// A value as a message repeats it: printable, and cut after kLongestShown bytes.
std::string shown_briefly(std::string_view text);
/// A whole message: printable, one line, cut after kLongestWord bytes.
std::string message_line(std::string_view text);

}  // namespace moectl
