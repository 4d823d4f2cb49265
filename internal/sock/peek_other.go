//go:build !unix && !windows

package sock

import "os"

// CanPeek says whether this system lets a process look at a socket's waiting data without
// taking it. These systems do not: connections are lent by the rules of age alone, and
// Stats.Unprobed counts them.
const CanPeek = false

// ID is empty: these systems do not identify sockets.
type ID struct{}

// Identify returns false: these systems do not tell.
func Identify(uintptr) (ID, bool) { return ID{}, false }

// Still assumes that fd is the socket it was.
func Still(uintptr, ID) bool { return true }

// Peek reports a live peer and no data, because it cannot look.
func Peek(uintptr) Seen { return Seen{} }

// ReadNow always fails as if no data were waiting.
func ReadNow(uintptr, []byte) (int, error) { return 0, os.ErrDeadlineExceeded }
