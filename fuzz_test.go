package connpool

import (
	"io/fs"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// FuzzParseAddr: whatever parses is canonical and comes back from its own text
// as the same value; whatever does not says so and is no address.
//
// BETA-X02
func FuzzParseAddr(f *testing.F) {
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseAddr(s)
		if err != nil {
			require.Zero(t, a)
			require.ErrorIs(t, err, fs.ErrInvalid)
			require.True(t, strings.HasPrefix(err.Error(), "connpool: ParseAddr("), err.Error())
			if len(s) > 0 {
				require.Error(t, new(Addr).UnmarshalText([]byte(s)))
			}
			return
		}
		canon, err := a.canonical()
		require.NoError(t, err)
		require.Equal(t, a, canon)

		text := a.String()
		requirePrintable(t, text)
		back, err := ParseAddr(text)
		require.NoError(t, err)
		require.Equal(t, a, back)
		require.Zero(t, a.Compare(back))
		require.Equal(t, text, back.String())

		marshaled, err := a.MarshalText()
		require.NoError(t, err)
		require.Equal(t, text, string(marshaled))
		var u Addr
		require.NoError(t, u.UnmarshalText(marshaled))
		require.Equal(t, a, u)
	})
}

// FuzzPoolOps runs the input as a program of the state-machine test.
func FuzzPoolOps(f *testing.F) {
	f.Add([]byte("borrow, give back, and so on"))
	for seed := range byte(8) {
		program := make([]byte, 600)
		rand.NewChaCha8([32]byte{seed, 7}).Read(program)
		f.Add(program)
	}
	f.Fuzz(func(t *testing.T, program []byte) {
		if err := runProgram(t, program, 2000); err != nil {
			t.Fatal(err)
		}
	})
}
