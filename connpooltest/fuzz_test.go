package connpooltest_test

import (
	"testing"

	"github.com/seed-ecb488c9/connpool/connpooltest"
)

func FuzzGoodClient(f *testing.F) { connpooltest.Fuzz(f, good()) }

// The text, the bytes and the script are one thing in three forms.
func FuzzScript(f *testing.F) {
	f.Add("late@0 ok", []byte{3, 0, 0, 0})
	f.Add("split@-1& cut@end drip@3", []byte{0x86, 0xff, 1, 0x7f, 7})
	f.Fuzz(func(t *testing.T, text string, b []byte) {
		if s, err := connpooltest.ParseScript(text); err == nil {
			again, err := connpooltest.ParseScript(s.String())
			if err != nil || again.String() != s.String() {
				t.Fatalf("%q becomes %q, and that %q, %v", text, s, again, err)
			}
		}
		s := connpooltest.FromBytes(b)
		if again := connpooltest.FromBytes(s.Bytes()); again.String() != s.String() {
			t.Fatalf("%q becomes %q", s, again)
		}
		if again, err := connpooltest.ParseScript(s.String()); err != nil || again.String() != s.String() {
			t.Fatalf("%q becomes %q, %v", s, again, err)
		}
	})
}
