package gateway

import (
	"fmt"
)

// LengthField says where a frame holds its own length.
type LengthField struct {
	Offset   int  // bytes before the field, 0 to 64
	Size     int  // bytes of the field: 1, 2 or 4
	Little   bool // least significant byte first
	WithHead bool // the number counts the field and the bytes before it as well, not only the bytes after it
}

const maxLengthOffset = 64

func (l LengthField) validate() error {
	switch {
	case l.Size != 1 && l.Size != 2 && l.Size != 4:
		return fmt.Errorf("-length-bytes is %d: use 1, 2 or 4", l.Size)
	case l.Offset < 0 || l.Offset > maxLengthOffset:
		return fmt.Errorf("-length-offset is %d: use 0 to %d", l.Offset, maxLengthOffset)
	}
	return nil
}

func (l LengthField) head() int { return l.Offset + l.Size }

// total returns the length of the frame that begins with head.
func (l LengthField) total(head []byte) (int64, error) {
	var n int64
	for i, c := range head[l.Offset:l.head()] {
		if l.Little {
			n |= int64(c) << (8 * i)
		} else {
			n = n<<8 | int64(c)
		}
	}
	if !l.WithHead {
		return n + int64(l.head()), nil
	}
	if n < int64(l.head()) {
		return 0, &malformed{fmt.Sprintf("a frame says that it is %d bytes long, with a header of %d", n, l.head())}
	}
	return n, nil
}

// lengthScanner collects the header, which may come in pieces, and then counts bytes.
type lengthScanner struct {
	field LengthField
	max   int
	check func(head []byte) error // nil: any header is accepted

	head [maxLengthOffset + 4]byte
	have int   // bytes of head
	rest int64 // bytes of the frame still to come, once the header is complete
}

func (s *lengthScanner) scan(b []byte) (int, bool, error) {
	used := 0
	if want := s.field.head(); s.have < want {
		n := copy(s.head[s.have:want], b)
		s.have += n
		used += n
		if s.have < want {
			return used, false, nil
		}
		total, err := s.field.total(s.head[:want])
		switch {
		case err != nil:
			return used, false, err
		case total > int64(s.max):
			return used, false, errTooLong
		}
		if s.check != nil {
			if err := s.check(s.head[:want]); err != nil {
				return used, false, err
			}
		}
		s.rest = total - int64(want)
	}
	n := int(min(s.rest, int64(len(b)-used)))
	s.rest -= int64(n)
	used += n
	if s.rest > 0 {
		return used, false, nil
	}
	s.have = 0
	return used, true, nil
}
