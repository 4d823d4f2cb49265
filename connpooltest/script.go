package connpooltest

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// Fault is what goes wrong in one exchange. Cut to Drip concern a byte of the reply, the
// byte At of the [Step].
type Fault uint8

const (
	OK     Fault = iota // nothing: the reply comes whole and at once
	Cut                 // the server closes the connection before byte At of the reply
	Reset               // the server resets the connection there
	Late                // the rest of the reply comes after the borrower has given up
	Cancel              // the ctx of the borrower is cancelled there; the rest of the reply comes later, as with Late
	Hang                // the rest of the reply never comes, and the server answers nothing more on this connection
	Split               // the rest of the reply comes a moment later
	Drip                // the reply comes in pieces of At bytes each, a moment apart
	Extra               // a frame that nobody asked for comes behind the reply, at once
	Ahead               // such a frame comes before the reply
	Wrong               // the reply is the reply to a request that nobody made

	// The next four happen before the exchange, while no other exchange is under way. The
	// exchange itself is then answered as with OK.

	CutIdle // the server closes its idle connections
	Unasked // the server sends a frame on each idle connection
	Refuse  // the next dial fails
	HangUp  // the server accepts the next connection and closes it at once

	numFaults
)

var faultNames = [numFaults]string{"ok", "cut", "reset", "late", "cancel", "hang", "split", "drip",
	"extra", "ahead", "wrong", "cutidle", "unasked", "refuse", "hangup"}

// String is the name in the text of a [Script], such as "late".
func (f Fault) String() string {
	if f >= numFaults {
		return fmt.Sprintf("Fault(%d)", uint8(f))
	}
	return faultNames[f]
}

// hasPosition reports whether Step.At means anything.
func (f Fault) hasPosition() bool { return f >= Cut && f <= Drip }

// isBetween reports whether the fault happens while no exchange is under way.
func (f Fault) isBetween() bool { return f >= CutIdle }

// End as Step.At is the end of the reply, whatever its length.
const End = math.MaxInt

// Step is one exchange of a script. The zero Step is an exchange in which nothing goes
// wrong.
type Step struct {
	Fault Fault

	// At is a number of bytes of the reply, for the faults from Cut to Split: what is
	// sent before the fault. A negative number counts from the end: with -1 all but the
	// last byte. End, and any number above the length of the reply, is the whole reply.
	// For Drip it is the size of the pieces, at least 1.
	At int

	// Overlap lets the next step begin while this one is under way.
	Overlap bool
}

// String is the step in the text of a [Script].
func (s Step) String() string {
	text := s.Fault.String()
	switch {
	case !s.Fault.hasPosition():
	case s.At == End:
		text += "@end"
	default:
		text += "@" + strconv.Itoa(s.At)
	}
	if s.Overlap {
		text += "&"
	}
	return text
}

// position is At for a reply of n bytes.
func (s Step) position(n int) int {
	at := s.At
	if at < 0 {
		at += n
	}
	return min(max(at, 0), n)
}

// Script is a sequence of exchanges, in the order in which they begin. Its text, which
// String prints and ParseScript reads, is one word for each step: the name of the fault,
// for some faults "@" and a number of bytes or "end", and "&" if the next step begins
// while this one is under way:
//
//	late@0 ok
//	split@-1& cut@3 ok extra unasked
type Script []Step

// String is the text of the script.
func (s Script) String() string {
	words := make([]string, len(s))
	for i, step := range s {
		words[i] = step.String()
	}
	return strings.Join(words, " ")
}

// ParseScript reads the text of a script. "@" and the number may be left out, which means
// 0 (for drip 1). The error quotes the word that is wrong.
func ParseScript(text string) (Script, error) {
	var s Script
	for _, word := range strings.Fields(text) {
		rest, overlap := strings.CutSuffix(word, "&")
		name, at, hasAt := strings.Cut(rest, "@")
		f := slices.Index(faultNames[:], name)
		if f < 0 {
			return nil, fmt.Errorf("connpooltest: %q in a script: no fault is called %q; there are %s", word, name, strings.Join(faultNames[:], ", "))
		}
		step := Step{Fault: Fault(f), Overlap: overlap}
		switch {
		case hasAt && !step.Fault.hasPosition():
			return nil, fmt.Errorf("connpooltest: %q in a script: %s takes no number", word, name)
		case at == "end" && step.Fault != Drip:
			step.At = End
		case hasAt:
			n, err := strconv.Atoi(at)
			if err != nil {
				return nil, fmt.Errorf("connpooltest: %q in a script: %q is no number of bytes", word, at)
			}
			step.At = n
		}
		if step.Fault == Drip {
			step.At = max(step.At, 1)
		}
		s = append(s, step)
	}
	return s, nil
}

// MustParseScript is [ParseScript] for a text that is a constant. It panics if the text is
// wrong.
func MustParseScript(text string) Script {
	s, err := ParseScript(text)
	if err != nil {
		panic(err)
	}
	return s
}

// maxSteps is how many steps FromBytes makes. Longer scripts only take longer.
const maxSteps = 24

// FromBytes makes a script of any bytes, for a fuzz target: two bytes for each step, 24
// steps at most. [Script.Bytes] is its inverse.
func FromBytes(b []byte) Script {
	var s Script
	for len(b) > 0 && len(s) < maxSteps {
		step := Step{Fault: Fault(b[0]&0x7f) % numFaults, Overlap: b[0]&0x80 != 0}
		var at byte
		if len(b) > 1 {
			at = b[1]
		}
		switch {
		case step.Fault == Drip:
			step.At = 1 + int(at)%longestPiece
		case !step.Fault.hasPosition():
		case at == endByte:
			step.At = End
		default:
			step.At = int(int8(at))
		}
		s = append(s, step)
		b = b[min(2, len(b)):]
	}
	return s
}

const (
	endByte      = 0x7f // in FromBytes: the end of the reply
	longestPiece = 16   // of a Drip that FromBytes makes
)

// Bytes returns bytes of which FromBytes makes this script, for testing.F.Add. Steps
// beyond the 24th are left out. Positions below -128 and above 126, and pieces of more
// than 16 bytes, become the nearest that there are.
func (s Script) Bytes() []byte {
	var b []byte
	for _, step := range s[:min(len(s), maxSteps)] {
		first, second := byte(step.Fault), byte(0)
		if step.Overlap {
			first |= 0x80
		}
		switch {
		case step.Fault == Drip:
			second = byte(min(max(step.At, 1), longestPiece) - 1)
		case !step.Fault.hasPosition():
		case step.At == End:
			second = endByte
		default:
			second = byte(int8(min(max(step.At, math.MinInt8), endByte-1)))
		}
		b = append(b, first, second)
	}
	return b
}
