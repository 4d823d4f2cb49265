package connpool

import "sync/atomic"

// The budget of file handles. MaxOpen 0 means the process's limit less a reserve for
// everything else in the process. But other code uses handles too, so the pool also looks
// at how many are really taken. A new descriptor gets the lowest free number, so a socket
// with number N proves that 0 to N are all in use, by the pool or by other code. Above the
// low mark the pool keeps no connection that nobody waits for. Above the high mark it closes
// one idle connection for each new one.
//
// An example: the limit is 1024. The reserve is 128, so the budget is 896 connections. The
// low mark is reached with fewer than 64 numbers above that of the new descriptor (960 and
// higher), the high mark with fewer than 32 (992 and higher).

// pressure says how short file handles are.
type pressure uint8

const (
	handlesPlenty   pressure = iota
	handlesLow               // a connection that is given back is closed unless somebody waits for it
	handlesCritical          // and one idle connection is closed for each new one
)

// reserveOf is how many handles are left to the rest of the process.
func reserveOf(limit int) int { return min(max(16, limit/8), limit/2) }

// pressureAt is the pressure on file handles if a new descriptor got the number fd.
func pressureAt(fd uintptr, limit int) pressure {
	switch left := limit - 1 - int(fd); {
	case left < max(6, limit/32):
		return handlesCritical
	case left < max(10, limit/16):
		return handlesLow
	}
	return handlesPlenty
}

// handleBudget is how many connections the process's handle limit allows, as of the last
// refresh. It guards itself.
type handleBudget struct{ atomic.Int64 }
