// The policies that come with the library: each .cc beside this file defines one of these.
#pragma once

#include "moectl/policy.h"

namespace moectl::policies {

PolicyDescription adaptive_bias();
PolicyDescription fixed();
PolicyDescription pi();
PolicyDescription sign_bias();

}  // namespace moectl::policies
