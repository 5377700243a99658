// The parts of the report page, put into the binary when it is built. Views of static memory.
#pragma once

#include <string_view>

namespace moectl::cli {

std::string_view page_html();
std::string_view page_css();
std::string_view page_js();
/// Chart.js, as Debian packages it (MIT).
std::string_view chart_js();

}  // namespace moectl::cli
