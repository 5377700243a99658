// The policies that come with the library: each .cc beside this file defines one of these.
#pragma once

#include "moectl/policy.h"

namespace moectl::policies {

PolicyDescription fixed();

}  // namespace moectl::policies
