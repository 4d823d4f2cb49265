package connpool

import (
	"errors"
	"math"
	"net"
)

// lookAtHandles brings the budget up to date: the process's limit on file
// handles less an eighth (16 at least), which is left to everything else in the
// process. The limit may change while the program runs (Go itself raises it at
// start), so every dial looks again.
func (p *Pool) lookAtHandles() {
	if p.cfg.MaxOpen != 0 {
		return
	}
	limit, ok := handleLimit()
	if !ok {
		p.handles.Store(math.MaxInt)
		return
	}
	p.handles.Store(int64(max(1, limit-max(16, limit/8))))
}

// exhausted reports whether err says that the process or the system has no
// file handle left.
func exhausted(err error) bool {
	return errors.Is(err, errProcessFiles) || errors.Is(err, errSystemFiles)
}

// outOfHandles sees it also where it hides: without a free handle a name cannot
// be looked up, and package net says "no such host".
func outOfHandles(err error) bool {
	var dns *net.DNSError
	return exhausted(err) || errors.As(err, &dns) && noHandleFree()
}
