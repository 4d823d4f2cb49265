package gateway

import "bytes"

// lineScanner: a frame ends with a line feed, which is part of it.
type lineScanner struct{}

func (lineScanner) scan(b []byte) (int, bool, error) {
	if i := bytes.IndexByte(b, '\n'); i >= 0 {
		return i + 1, true, nil
	}
	return len(b), false, nil
}
